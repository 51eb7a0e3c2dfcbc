"""Small pictures, decoded once and kept on the device as uint8; their batches are a function of (seed, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import UserError
from .data import Picture, encoded, image_files, open_dataset
from .draws import Draws, micro_batches, visited
from .sections import ImagesConfig


@dataclass(frozen=True)
class Images:
    """pixels (N, C, S, S) uint8; labels (N,) int64, all -1 where there are none."""

    pixels: Tensor
    labels: Tensor

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.pixels.cpu().numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def floats(self, rows: Tensor) -> Tensor:
        """(B, C, S, S) in [-1, 1]."""
        return self.pixels[rows].float() / 127.5 - 1

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


def load_images(config: ImagesConfig, split: str) -> Images:
    """Raises: UserError for a source that cannot be read or holds nothing, naming the split and the picture."""
    if config.image_dir is not None:
        found = [Picture(str(path), path.read_bytes, "") for path in image_files(config.image_dir)]
        labels = [None] * len(found)
    else:
        name, columns = config.dataset_name, {"image_column": config.image_column, "label_column": config.label_column}
        rows = open_dataset(name, split, columns)
        labels = rows[config.label_column] if config.label_column else [None] * len(rows)
        cells = enumerate(rows[config.image_column])
        found = [Picture(f"{name} {split}[{i}]", partial(encoded, cell), "") for i, cell in cells]
    labels = [-1 if label is None else label for label in labels]
    kept = [i for i, label in enumerate(labels) if config.only_label is None or label == config.only_label]
    if not kept:
        wish = "" if config.only_label is None else f" with the label {config.only_label}"
        raise UserError(f"data: {config.image_dir or config.dataset_name} has no pictures{wish} in {split!r}")
    pixels = np.stack([fit(found[i].decode(), config) for i in kept])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([labels[i] for i in kept]))


def fit(image: Image.Image, config: ImagesConfig) -> np.ndarray:
    """(resolution, resolution, channels) uint8."""
    side = config.resolution
    image = image.convert("L" if config.channels == 1 else "RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(side, side, config.channels)


@dataclass
class Batches:
    """The micro-batches of each step for one process: {"x": (B, C, S, S) in [-1, 1], "label": (B,)}."""

    images: Images
    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    def __call__(self, step: int) -> Iterator[tuple[dict[str, Tensor], Draws]]:
        total = self.batch_size * self.accumulation * self.world
        count, device = len(self.images), self.images.pixels.device
        for rows in micro_batches(self.batch_size, self.accumulation, self.rank, self.world):
            chosen = torch.tensor([visited(self.seed, step * total + row, count) for row in rows], device=device)
            batch = {"x": self.images.floats(chosen), "label": self.images.labels[chosen]}
            yield batch, Draws(self.seed, step, rows, device, total)
