"""From tensors to pictures and back; labelled grids and GIFs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainers.atomic import replacing_file


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pil(x: Tensor) -> list[Image.Image]:
    """(B, 1 or 3, H, W) in [-1, 1] to RGB."""
    array = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.broadcast_to(a, (*a.shape[:2], 3)).copy()) for a in array]


def mirror_pad(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W), made at least `height` by `width` by mirroring at the lower and the right
    edge."""
    while x.shape[-2] < height or x.shape[-1] < width:
        down = min(max(0, height - x.shape[-2]), x.shape[-2])
        right = min(max(0, width - x.shape[-1]), x.shape[-1])
        x = torch.cat([x, x.flip(-2)[..., :down, :]], -2)
        x = torch.cat([x, x.flip(-1)[..., :right]], -1)
    return x


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of the path's suffix; no half of it is ever found."""
    with replacing_file(path) as temporary:
        picture.save(temporary)


def write_grid(rows: list[tuple[str, list[Image.Image]]], path: Path, tile: int = 256) -> None:
    """A labelled PNG: each row a title and its pictures, small ones enlarged without smoothing.

    Pictures keep their shape: the longer side fills a square cell, and the rest of it stays white.
    """
    font, gap, columns = ImageFont.load_default(14), 6, max(len(pictures) for _, pictures in rows)
    side = max(max(picture.size) for _, pictures in rows for picture in pictures)
    side *= max(1, tile // side)
    width = columns * (side + gap) + gap
    titles = [textwrap.wrap(title, max(12, width // 8)) for title, _ in rows]
    sheet = Image.new(
        "RGB", (width, sum(side + gap + 18 * len(t) + 6 for t in titles) + gap), "white"
    )
    draw, y = ImageDraw.Draw(sheet), gap
    for lines, (_, pictures) in zip(titles, rows, strict=True):
        draw.text((gap, y), "\n".join(lines), "black", font)
        y += 18 * len(lines) + 6
        for i, picture in enumerate(pictures):
            scale = side / max(picture.size)
            size = tuple(max(1, round(scale * length)) for length in picture.size)
            left, top = ((side - length) // 2 for length in size)
            cell = picture.resize(size, Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + i * (side + gap) + left, y + top))
        y += side + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(sheet, path)


def write_gif(frames: Iterable[list[Image.Image]], path: Path, side: int = 64) -> None:
    """A GIF that goes round; the pictures of a frame are tiles of a square."""
    sheets = []
    for pictures in frames:
        columns = math.isqrt(len(pictures))
        sheets.append(sheet := Image.new("RGB", (columns * side, columns * side)))
        for i, picture in enumerate(pictures):
            tile = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (i % columns * side, i // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        sheets[0].save(temporary, save_all=True, append_images=sheets[1:], duration=80, loop=0)
