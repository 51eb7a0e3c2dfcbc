"""Small pictures, decoded once and kept on the device as uint8; their batches are a function of (seed, step)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import UserError
from .data import image_files
from .draws import Draws, mix, permutation
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
        files = image_files(config.image_dir)
        encoded, labels = [path.read_bytes() for path in files], [-1] * len(files)
        names = [str(path) for path in files]
    else:
        encoded, labels = from_dataset(config, split)
        names = [f"{config.dataset_name} {split}[{i}]" for i in range(len(encoded))]
    kept = [i for i, label in enumerate(labels) if config.only_label is None or label == config.only_label]
    if not kept:
        wish = "" if config.only_label is None else f" with the label {config.only_label}"
        raise UserError(f"data: {config.image_dir or config.dataset_name} has no pictures{wish} in {split!r}")
    pixels = np.stack([decode(encoded[i], names[i], config) for i in kept])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([labels[i] for i in kept]))


def from_dataset(config: ImagesConfig, split: str) -> tuple[list[bytes], list[int]]:
    import datasets

    name = config.dataset_name
    try:
        local = Path(name)
        if local.is_dir() and list(local.glob("*.parquet")):
            files = {path.stem: str(path) for path in local.glob("*.parquet")}
            rows = datasets.load_dataset("parquet", data_files=files, split=split)
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise UserError(f"data.dataset_name: cannot load {name!r}, split {split!r} ({error})") from error
    for key, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}: {name} has no column {column!r}, it has {', '.join(rows.column_names)}")
    rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    encoded = [image["bytes"] for image in rows[config.image_column]]
    return encoded, list(rows[config.label_column]) if config.label_column else [-1] * len(encoded)


def decode(content: bytes, name: str, config: ImagesConfig) -> np.ndarray:
    """(size, size, channels) uint8."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = image.convert("L" if config.channels == 1 else "RGB")
            if image.size != (config.resolution, config.resolution):
                image = image.resize((config.resolution, config.resolution), Image.Resampling.LANCZOS)
            return np.asarray(image).reshape(config.resolution, config.resolution, config.channels)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserError(f"{name} is not a readable picture ({error}): mend or remove it") from None


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
        for micro in range(self.accumulation):
            first = (micro * self.world + self.rank) * self.batch_size
            rows = range(first, first + self.batch_size)
            device = self.images.pixels.device
            chosen = torch.tensor([self.visit(step * total + row) for row in rows], device=device)
            batch = {"x": self.images.floats(chosen), "label": self.images.labels[chosen]}
            yield batch, Draws(self.seed, step, rows, device, total)

    def visit(self, position: int) -> int:
        epoch, place = divmod(position, len(self.images))
        return permutation(mix(self.seed, epoch, "order"), len(self.images))[place]
