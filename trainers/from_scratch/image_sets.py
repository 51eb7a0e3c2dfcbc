"""Small pictures and pairs as uint8, decoded once and kept on the device; batches are a function of
(seed, step)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainers.config import ImagesConfig
from trainers.data.bit_depth import check_bit_depth
from trainers.data.imaging import mirror_pad
from trainers.data.masks import turn_alike
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.data.transfer import send, send_numbers
from trainers.errors import UserError
from trainers.from_scratch.augment import augment
from trainers.from_scratch.image_samples import ImageSample, choose_evenly, list_samples
from trainers.from_scratch.labels import UNLABELED, find_classes, list_names
from trainers.progress import track
from trainers.training.facts import Facts
from trainers.training.picture_facts import describe_pictures

TargetReader = Callable[[Picture], Image.Image]


class ImageSet:
    """(C, H, W) uint8 pictures, those of a pair one above the other; labels (N,) int64 from 0.

    class_names: what each label stands for; empty where pictures have none.
    """

    def __init__(
        self,
        samples: Sequence[ImageSample],
        decode: Callable[[ImageSample], Tensor],
        in_memory: bool,
        device,
        class_names: Sequence[str] = (),
    ) -> None:
        """in_memory: decode all now, into one tensor (N, C, H, W) if they are of one size. Raises:
        UserError."""
        self.samples, self.decode, self.device = samples, decode, device
        self.class_names = class_names
        self.labels = torch.tensor([sample.label for sample in samples], device=device)
        self.pixels: Tensor | list[Tensor] | None = None
        if in_memory:
            pixels = [decode(sample).to(device) for sample in track(samples, "decoding")]
            self.pixels = torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Tensor:
        """(C, H, W), where it is kept: on the device, or on the CPU if it is decoded now."""
        return self.decode(self.samples[row]) if self.pixels is None else self.pixels[row]

    def take(self, rows: Sequence[int]) -> Tensor:
        """(B, C, S, S) of pictures of one size, on the device."""
        if isinstance(self.pixels, Tensor):
            return self.pixels[send_numbers(rows, self.device)]
        return send(torch.stack([self[row] for row in rows]), self.device)

    def take_labels(self, rows: Sequence[int]) -> Tensor:
        """(B,) on the device."""
        return self.labels[send_numbers(rows, self.device)]

    def describe(self) -> Facts:
        """The pictures, with their targets and labels, as a resumed run compares them."""
        entries = []
        for sample in self.samples:
            content = sample.picture.digest
            if sample.target:
                content = hashlib.sha256((content + sample.target.digest).encode()).hexdigest()
            entries.append((sample.picture.name, content, str(sample.label)))
        return describe_pictures(entries)


def load_images(
    config: ImagesConfig,
    device,
    held_out: bool = False,
    read_target: TargetReader | None = None,
    every_class: bool | None = None,
) -> ImageSet | None:
    """What is learnt from, or what is held out to measure on (None where nothing is).

    read_target: how the second of a pair is read; every_class: keep pictures of other classes than
    `only_label`, which is usual for those that are held out. Raises: UserError for a source that
    cannot be read or is empty, and for labels that are no classes.
    """
    classes = find_classes(config)
    samples = list_samples(config, held_out, read_target is not None, classes)
    if samples is None:
        return None
    folder = config.test_dir if held_out and config.test_dir is not None else config.train_dir
    source = f"data: {folder or config.dataset_name}"
    if config.image_dir is None:
        source += f", split {config.test_split if held_out else config.train_split!r}"
    elif config.folds is not None:
        source += f", fold {config.fold} of {config.folds}"
    keep_every_class = held_out if every_class is None else every_class
    if config.only_label is not None and not keep_every_class:
        wanted = classes.index(config.only_label)
        samples = [sample for sample in samples if sample.label == wanted != UNLABELED]
        source += f", label {config.only_label}"
    if not samples:
        known = f"; its classes are {list_names(classes.names)}" if classes else ""
        raise UserError(f"{source}: there is no picture{known}")
    if not held_out:
        check_bit_depth([s.picture for s in choose_evenly(samples)], config.bit_depth)
    return ImageSet(
        samples,
        partial(decode_sample, config=config, read_target=read_target),
        config.in_memory,
        device,
        classes.names if classes else (),
    )


def decode_sample(
    sample: ImageSample, config: ImagesConfig, read_target: TargetReader | None
) -> Tensor:
    """(C, H, W) uint8, the target's channels last; masks (mode P) are resized by the nearest pixel.

    Raises: UserError when the two have not one size.
    """
    images = [sample.picture.decode().convert("L" if config.channels == 1 else "RGB")]
    if read_target is not None:
        images.append(turn_alike(read_target(sample.target), sample.target, sample.picture))
        if images[0].size != images[1].size:
            sizes = " and ".join("{} x {}".format(*image.size) for image in images)
            raise UserError(
                f"{sample.picture.name} and {sample.target.name} are not of one size: {sizes}"
            )
    if config.resize_to is not None:
        size = (config.resize_to, config.resize_to)
        images = [
            image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
            for image in images
        ]
    arrays = [np.array(image) for image in images]
    return torch.cat(
        [torch.from_numpy(a).reshape(*a.shape[:2], -1).permute(2, 0, 1) for a in arrays]
    ).contiguous()


@dataclass
class ImageBatches:
    """The micro-batches of each step for one process: {"pixels": (B, C, S, S) uint8, "label":
    (B,)}.

    num_mask_channels: how many of the last channels are masks.
    """

    images: ImageSet
    config: ImagesConfig
    batch_slice: BatchSlice
    num_mask_channels: int = 0

    def __call__(self, step: int) -> Iterator[tuple[dict[str, Tensor], SampleRng]]:
        for rows in self.batch_slice.micro_batches():
            indices = self.sample_indices(step, rows)
            if self.config.resize_to is None:
                crops = [self.random_crop(step, *pair) for pair in zip(rows, indices, strict=True)]
                pixels = send(torch.stack(crops), self.images.device)
            else:
                pixels = self.images.take(indices)
            rng = SampleRng(
                self.batch_slice.seed,
                step,
                rows,
                self.images.device,
                self.batch_slice.global_batch_size,
            )
            yield (
                {
                    "pixels": augment(pixels, self.config, rng, self.num_mask_channels),
                    "label": self.images.take_labels(indices),
                },
                rng,
            )

    def heaviest_step(self, start: int) -> int:
        """The first step from `start` on that needs as much memory as any: all are alike."""
        return start

    def split_micro_batches(self) -> None:
        """From now on take more and smaller micro-batches for each step."""
        self.batch_slice = self.batch_slice.split_micro_batches()

    def sample_indices(self, step: int, rows: range) -> list[int]:
        return [self.batch_slice.sample_index(step, row, len(self.images)) for row in rows]

    def sample_names(self, step: int) -> list[list[str]]:
        """Of the pictures in each micro-batch."""
        parts = [self.sample_indices(step, rows) for rows in self.batch_slice.micro_batches()]
        return [[self.images.samples[i].picture.name for i in part] for part in parts]

    def random_crop(self, step: int, row: int, index: int) -> Tensor:
        """(C, S, S) at a random place; what is smaller is mirrored at its edges."""
        side, r = (
            self.config.resolution,
            random.Random(derive_seed(self.batch_slice.seed, step, row, "crop")),
        )
        pixels = mirror_pad(self.images[index][None], side, side)[0]
        top, left = (r.randrange(length - side + 1) for length in pixels.shape[1:])
        return pixels[:, top : top + side, left : left + side]
