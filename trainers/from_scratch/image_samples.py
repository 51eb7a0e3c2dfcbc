"""Which pictures a small network is trained on or measured with: those of a folder, in pairs or
alone, or the rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainers.config import ImagesConfig, PairsConfig
from trainers.data.dataset_rows import open_dataset, read_encoded
from trainers.data.folders import list_image_files, relative_name, scan_folder
from trainers.data.intake import Intake
from trainers.data.pictures import Picture, picture_from_file
from trainers.errors import UserError
from trainers.from_scratch.labels import UNLABELED, Classes

MAX_INSPECTED = 1000  # pictures


@dataclass(frozen=True)
class ImageSample:
    """A picture, what belongs to it in a data set of pairs, and its class, -1 where there is
    none."""

    picture: Picture
    target: Picture | None = None
    label: int = UNLABELED

    @property
    def parts(self) -> list[Picture]:
        return [part for part in (self.picture, self.target) if part]


def list_samples(
    config: ImagesConfig,
    held_out: bool,
    pairs: bool,
    classes: Classes | None = None,
) -> list[ImageSample] | None:
    """All that is learnt from, or held out (None where nothing is). Raises: UserError."""
    if config.image_dir is None:
        split = config.test_split if held_out else config.train_split
        return None if split is None else samples_from_dataset(config, split, pairs, classes)
    if held_out and not config.holds_out:
        return None
    if config.test_dir is not None:
        return samples_from_folder(config, config.test_dir if held_out else config.train_dir)
    samples = learnt_samples(config, pairs)
    if config.folds is None:
        return samples
    return [s for i, s in enumerate(samples) if (i % config.folds == config.fold) == held_out]


def learnt_samples(config: ImagesConfig, pairs: bool) -> list[ImageSample]:
    """Those of the folder that pictures are learnt from. Raises: as `samples_from_pairs`."""
    return samples_from_pairs(config) if pairs else samples_from_folder(config, config.train_dir)


def samples_from_folder(config: ImagesConfig, folder: Path) -> list[ImageSample]:
    picture = partial(picture_from_file, bit_depth=config.bit_depth)
    return [ImageSample(picture(path)) for path in list_image_files(folder)]


def describe_folder(config: ImagesConfig, pairs: bool, intake: Intake) -> None:
    """Note the pictures of a folder, and what in it is not used."""
    contents = scan_folder(config.train_dir)
    used = {part.name for s in learnt_samples(config, pairs) for part in s.parts}
    # text files and metadata are captions, and nothing here reads captions
    files = [*contents.pictures, *contents.sidecars, *contents.metadata, *contents.unused]
    contents.unused = [path for path in files if str(path) not in used]
    intake.note(
        f"{len(used)} {'pictures in pairs' if pairs else 'pictures'} in {contents.root.name}"
    )
    intake.describe_unused(contents)


def samples_from_pairs(config: PairsConfig) -> list[ImageSample]:
    """A file has the longest ending that fits. Raises: UserError for pictures without a partner, or
    with two."""
    by_end: dict[str, dict[str, Path]] = {config.image_suffix: {}, config.target_suffix: {}}
    for path in list_image_files(config.image_dir):
        if suffixes := [suffix for suffix in by_end if path.stem.endswith(suffix)]:
            suffix = max(suffixes, key=len)
            paths = by_end[suffix]
            name = relative_name(path.parent / path.stem.removesuffix(suffix), config.image_dir)
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


def choose_evenly(samples: Sequence[ImageSample]) -> Sequence[ImageSample]:
    """Of a large set every n-th sample, whose file is looked at before the set is decoded."""
    return samples[:: -(-len(samples) // MAX_INSPECTED)]


def samples_from_dataset(
    config: ImagesConfig, split: str, pairs: bool, classes: Classes | None
) -> list[ImageSample]:
    columns = {"image_column": config.image_column}
    if pairs:
        columns["target_column"] = config.target_column
    rows = open_dataset(config.dataset_name, split, columns | {"label_column": config.label_column})
    source = f"data: {config.dataset_name}, split {split!r}"
    labels = classes.indices(rows, config.label_column, source) if classes else None

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
            label=labels[i] if labels else UNLABELED,
        )
        for i in range(len(rows))
    ]
