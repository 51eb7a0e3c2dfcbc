"""Small pictures and pairs as uint8, decoded once and kept on the device; batches are a function of
(seed, step)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from trainers.config import ImagesConfig, PairsConfig
from trainers.data.dataset_rows import open_dataset, read_encoded
from trainers.data.folders import FolderContents, relative_name, scan_folder
from trainers.data.imaging import mirror_pad
from trainers.data.intake import Intake
from trainers.data.pictures import Picture, picture_from_file
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.errors import UserError
from trainers.from_scratch.augment import augment
from trainers.from_scratch.image_checks import inspect_pictures
from trainers.from_scratch.masks import turn_alike

TargetReader = Callable[[Picture], Image.Image]


@dataclass(frozen=True)
class ImageSample:
    """A picture, what belongs to it in a data set of pairs, and its class, -1 where there is
    none."""

    picture: Picture
    target: Picture | None = None
    label: int = -1


class ImageSet:
    """(C, H, W) uint8 pictures, those of a pair one above the other; labels (N,) int64."""

    def __init__(
        self,
        samples: Sequence[ImageSample],
        decode: Callable[[ImageSample], Tensor],
        in_memory: bool,
        device,
    ) -> None:
        """in_memory: decode all now, into one tensor (N, C, H, W) if they are of one size. Raises:
        UserError."""
        self.samples, self.decode, self.device = samples, decode, device
        self.labels = torch.tensor([sample.label for sample in samples], device=device)
        self.pixels: Tensor | list[Tensor] | None = None
        if in_memory:
            pixels = [
                decode(sample).to(device)
                for sample in tqdm(samples, "decoding", leave=False, delay=2)
            ]
            self.pixels = torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Tensor:
        return (
            self.decode(self.samples[row]).to(self.device)
            if self.pixels is None
            else self.pixels[row]
        )

    def take(self, rows: Sequence[int]) -> Tensor:
        """(B, C, S, S) of pictures of one size."""
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.tensor(rows, device=self.device)]
        return torch.stack([self[row] for row in rows])

    @property
    def digest(self) -> str:
        """Of the files' contents."""
        parts = [
            part for sample in self.samples for part in (sample.picture, sample.target) if part
        ]
        return hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()


def load_images(
    config: ImagesConfig,
    device,
    held_out: bool = False,
    read_target: TargetReader | None = None,
    intake: Intake | None = None,
) -> ImageSet | None:
    """What is learnt from, or what is held out to measure on (None where nothing is).

    read_target: how the second of a pair is read. Raises: UserError for a source that cannot be
    read or is empty.
    """
    intake = intake or Intake()
    source = f"data: {config.image_dir or config.dataset_name}"
    if config.image_dir is not None:
        if held_out and config.folds is None:
            return None
        samples = samples_from_folder(config, read_target is not None, intake)
        if config.folds is not None:
            samples = [
                s for i, s in enumerate(samples) if (i % config.folds == config.fold) == held_out
            ]
            source += f", fold {config.fold} of {config.folds}"
    else:
        split = config.test_split if held_out else config.train_split
        if split is None:
            return None
        samples = samples_from_dataset(config, split, read_target is not None)
        source += f", split {split!r}"
    if config.only_label is not None and not held_out:
        samples = [sample for sample in samples if sample.label == config.only_label]
        source += f", label {config.only_label}"
    if not samples:
        raise UserError(f"{source}: there is no picture")
    if not held_out:
        inspect_pictures([sample.picture for sample in samples], config, intake)
    return ImageSet(
        samples,
        partial(decode_sample, config=config, read_target=read_target),
        config.in_memory,
        device,
    )


def samples_from_folder(config: ImagesConfig, pairs: bool, intake: Intake) -> list[ImageSample]:
    """Raises: as `samples_from_pairs`."""
    contents = scan_folder(config.image_dir)
    # text files and metadata are captions, and nothing here reads captions
    contents.unused += contents.sidecars + contents.metadata
    if pairs:
        samples = samples_from_pairs(config, contents)
        used = {Path(part.name) for s in samples for part in (s.picture, s.target)}
        contents.unused += [path for path in contents.pictures if path not in used]
    else:
        picture = partial(picture_from_file, bit_depth=config.bit_depth)
        samples = [ImageSample(picture(path)) for path in contents.pictures]
    intake.note(f"{len(samples)} {'pairs' if pairs else 'pictures'} in {contents.root.name}")
    intake.describe_unused(contents)
    return samples


def samples_from_pairs(
    config: PairsConfig, contents: FolderContents | None = None
) -> list[ImageSample]:
    """A file has the longest ending that fits. Raises: UserError for pictures without a partner, or
    with two."""
    contents = contents or scan_folder(config.image_dir)
    by_end: dict[str, dict[str, Path]] = {config.image_suffix: {}, config.target_suffix: {}}
    for path in contents.pictures:
        if suffixes := [suffix for suffix in by_end if path.stem.endswith(suffix)]:
            suffix = max(suffixes, key=len)
            paths = by_end[suffix]
            name = relative_name(path.parent / path.stem.removesuffix(suffix), contents.root)
            if name in paths:
                raise UserError(
                    f"data.image_dir: {paths[name].name} and {path.name} have one name: remove one"
                )
            paths[name] = path
    images, targets = by_end.values()
    if unpaired := sorted(images.keys() ^ targets.keys()):
        missing_suffix = config.target_suffix if unpaired[0] in images else config.image_suffix
        raise UserError(
            f"data.image_dir: {len(unpaired)} pictures have no partner, such as {unpaired[0]!r}: "
            f"there is no "
            f"{unpaired[0]}{missing_suffix}.* in {config.image_dir}. Pairs are named "
            f"*{config.image_suffix}.* and "
            f"*{config.target_suffix}.*"
        )
    picture = partial(picture_from_file, bit_depth=config.bit_depth)
    return [
        ImageSample(picture(path), picture(targets[name])) for name, path in sorted(images.items())
    ]


def samples_from_dataset(config: ImagesConfig, split: str, pairs: bool) -> list[ImageSample]:
    columns = {"image_column": config.image_column}
    if pairs:
        columns["target_column"] = config.target_column
    rows = open_dataset(config.dataset_name, split, columns | {"label_column": config.label_column})
    labels = rows[config.label_column] if config.label_column else [None] * len(rows)

    def picture(i: int, column: str) -> Picture:
        return Picture(
            f"{config.dataset_name} {split}[{i}] {column}",
            partial(read_encoded, rows, i, column),
            "",
            config.bit_depth,
        )

    return [
        ImageSample(
            *(picture(i, column) for column in columns.values()),
            label=-1 if label is None else label,
        )
        for i, label in enumerate(labels)
    ]


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
                pixels = torch.stack(
                    [self.random_crop(step, row, i) for row, i in zip(rows, indices, strict=True)]
                )
            else:
                pixels = self.images.take(indices)
            rng = SampleRng(
                self.batch_slice.seed,
                step,
                rows,
                self.images.device,
                self.batch_slice.global_batch_size,
            )
            labels = self.images.labels[torch.tensor(indices, device=self.images.device)]
            yield (
                {
                    "pixels": augment(pixels, self.config, rng, self.num_mask_channels),
                    "label": labels,
                },
                rng,
            )

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
