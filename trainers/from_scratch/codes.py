"""What an autoencoder is shown, and its codes as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.atomic import replacing_file
from trainers.config import AutoencoderConfig
from trainers.data.rng import SampleRng

PATCH_SIZE = 4  # side of what is hidden, pixels
MIN_TSNE_PICTURES = 4  # a third of the others are neighbours, at least one


def corrupt(x: Tensor, config: AutoencoderConfig, rng: SampleRng) -> Tensor:
    """What the model is shown: noise in units of the full range to denoise, hidden patches to find
    anomalies."""
    if config.use == "denoise":
        return (x + 2 * config.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
    if config.use == "anomaly":
        side = -(-x.shape[-1] // PATCH_SIZE)
        visible = rng.normal((len(x), 1, side, side)) > torch.special.ndtri(
            torch.tensor(config.objective.hidden)
        )
        visible = F.interpolate(visible.float(), scale_factor=PATCH_SIZE)[
            ..., : x.shape[-1], : x.shape[-1]
        ]
        return torch.where(visible > 0, x, -1)
    return x


def plot_codes(codes: Tensor, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """The codes (N, D) in the plane by t-SNE (van der Maaten and Hinton 2008), or as they are if D
    = 2, by class. Of fewer than four pictures t-SNE makes no plot."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    points = codes.cpu().numpy()
    if points.shape[1] != 2:
        if len(points) < MIN_TSNE_PICTURES:
            return
        points = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(
            points
        )
    figure = Figure((7, 7), layout="tight")
    axes, classes = figure.subplots(), labels.cpu().numpy()
    for label in sorted(set(classes.tolist())):
        axes.scatter(
            *points[classes == label].T,
            s=6,
            label=class_names[label],
            color=f"C{label}" if label < 10 else None,
        )
    axes.legend(title="class", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[], title="codes of test pictures")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
