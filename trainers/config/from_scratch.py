"""The config that the trainers of small networks from scratch share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainers.config.base import Config
from trainers.config.base_rules import Errors, SpecialKeys, folder_errors, irrelevant_keys
from trainers.config.base_sections import Section, field
from trainers.config.bounds import Name, NameOrPath, PathField, Pixels


class ImagesConfig(Section):
    """The pictures: a folder or a data set, their size, and how they are varied."""

    image_dir: PathField | None = field(None, "Folder with pictures, in sub-folders too.")
    folds: int | None = field(
        None,
        "image_dir: every folds-th picture is held out for evaluation; null: none.",
        ge=2,
        le=10_000,
    )
    fold: int = field(
        0, "image_dir: picture i is held out when i modulo folds is this.", ge=0, lt=10_000
    )
    dataset_name: NameOrPath | None = field(
        None, "Instead: a `datasets` Hub name, or a local folder of SPLIT.parquet files."
    )
    train_split: Name = field("train", "dataset_name: split to train on.")
    test_split: Name | None = field(
        "test", "dataset_name: split to evaluate on; null skips the evaluation."
    )
    image_column: Name = field("image", "Column that holds the pictures.")
    label_column: Name | None = field(None, "Column that holds the classes: numbers or names.")
    only_label: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] | Name | None = field(
        None, "Train on this class only: its value in label_column, or its name."
    )
    resolution: Pixels = field(28, "Side of the pictures in pixels; others are resized.")
    channels: Literal[1, 3] = field(1, "1 for gray, 3 for color.")
    bit_depth: Literal[8, 10, 12, 14, 16] | None = field(
        None, "Bits that gray pictures of 16 bits use, such as 12 of a microscope; null means 16."
    )
    in_memory: bool = field(
        True, "Decode all once and keep them on the device; false decodes at each step."
    )
    random_flip: bool = field(False, "Mirror half of the pictures.")
    random_vertical_flip: bool = field(False, "Turn half of the pictures upside down.")
    random_rotate: bool = field(False, "Turn by 0, 90, 180 or 270 degrees.")
    elastic: float = field(
        0.0,
        "Elastic deformation by a smooth random field of this standard deviation in pixels.",
        ge=0,
        le=1000,
    )
    strict: bool = field(False, "Warnings about the data end the run before it trains.")

    @property
    def resize_to(self) -> int | None:
        """The side that pictures are resized to; None: they keep their size."""
        return self.resolution

    @property
    def train_dir(self) -> Path | None:
        """The folder in image_dir that pictures are learnt from, image_dir itself as a rule."""
        return self.image_dir

    @property
    def test_dir(self) -> Path | None:
        """A folder in image_dir whose pictures are all held out, where there is one."""
        return None

    @property
    def holds_out(self) -> bool:
        """Whether some pictures are measured on and never learnt from."""
        if self.test_dir is not None:
            return True
        return (self.folds if self.image_dir else self.test_split) is not None


class ScratchConfig(Config):
    """What the trainers of small networks share."""

    data: ImagesConfig = ImagesConfig()

    def held_out_metrics(self, *names: str) -> dict[str, str]:
        """Those of held-out pictures, with what the config lacks for them."""
        needed = "data.folds" if self.data.image_dir else "data.test_split"
        needed += ", which holds pictures out"
        return dict.fromkeys(names, "" if self.data.holds_out else needed)

    def memory_suggestions(self) -> Iterator[str]:
        if self.data.in_memory:
            yield "data.in_memory=false: decodes pictures at each step, which is slower"
        yield from super().memory_suggestions()
        yield f"data.resolution={self.data.resolution // 2}, or a smaller model.width"

    def errors(self) -> Errors:
        yield from super().errors()
        special = SpecialKeys(["dreambooth"], "optimizer", ["text_encoder_lr", "lora_plus_ratio"])
        yield from irrelevant_keys(self, self.kind, [special])
        data = self.data
        if (data.image_dir is None) == (data.dataset_name is None):
            message = "set exactly one source of pictures, either this or data.image_dir"
            yield "data.dataset_name", message
        yield from folder_errors("data.image_dir", data.image_dir)
        if data.folds is not None and data.fold >= data.folds:
            yield "data.fold", f"must be less than data.folds, {data.folds}"
        if data.image_dir is None:
            special = SpecialKeys(["data.image_dir"], "data", ["folds", "fold"])
            yield from irrelevant_keys(self, "a data set", [special])
        is_single_file = data.dataset_name is not None and data.dataset_name.endswith(".parquet")
        if is_single_file and data.test_split is not None:
            message = (
                "a single .parquet file has one split: name a folder of SPLIT.parquet files "
                "instead, or set data.test_split to null, which measures nothing"
            )
            yield "data.test_split", message
        if data.image_dir is not None and data.label_column is not None:
            yield (
                "data.label_column",
                "a folder of pictures has no labels: set data.label_column to null",
            )
        if data.only_label is not None and data.label_column is None:
            message = "requires data.label_column, which says the class of each picture"
            yield "data.only_label", message
