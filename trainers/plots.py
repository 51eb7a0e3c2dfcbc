"""Plots and films."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor


def plot_codes(codes: Tensor, labels: Tensor, path: Path) -> None:
    """The codes (N, D) in the plane by t-SNE (van der Maaten and Hinton 2008), or as they are if D = 2, by class."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    points = codes.cpu().numpy()
    if points.shape[1] != 2:
        points = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
    figure = Figure((7, 7), layout="tight")
    axes, classes = figure.subplots(), labels.cpu().numpy()
    for label in sorted(set(classes.tolist())):
        axes.scatter(*points[classes == label].T, s=6, label=str(label), color=f"C{label}" if label < 10 else None)
    axes.legend(title="class", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[], title="codes of test pictures")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_film(frames: Iterable[list[Image.Image]], path: Path, side: int = 64) -> None:
    """A GIF that goes round; the pictures of a frame are tiles of a square."""
    sheets = []
    for pictures in frames:
        across = math.isqrt(len(pictures))
        sheets.append(sheet := Image.new("RGB", (across * side, across * side)))
        for i, picture in enumerate(pictures):
            tile = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (i % across * side, i // across * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=80, loop=0)
