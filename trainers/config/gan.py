"""The config of the GAN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from trainers.config.base_rules import Errors
from trainers.config.base_sections import OptimizerConfig, Section, ValidationConfig, field
from trainers.config.bounds import (
    Channels,
    CodeSize,
    Fraction,
    LearningRate,
    LossWeight,
    PathField,
)
from trainers.config.from_scratch import ScratchConfig


class GanModelConfig(Section):
    """The generator and the discriminator."""

    architecture: Literal["dcgan", "resnet"] = field(
        "dcgan", "Strided convolutions, or residual blocks."
    )
    latent_dim: CodeSize = field(64, "Size of the latent vector.")
    width: Channels = field(
        32, "Channels of the level with most pixels; doubled at each lower one."
    )
    spectral_norm: bool = field(
        False, "Spectral normalization of the discriminator's layers (Miyato et al. 2018)."
    )
    conditional: bool = field(
        False, "Condition the generator on a class; requires data.label_column."
    )


class GanObjectiveConfig(Section):
    """The loss of both players, and what keeps them in balance."""

    loss: Literal["non_saturating", "hinge", "wasserstein", "relativistic"] = field(
        "relativistic",
        "Loss of both players: Goodfellow 2014, Lim 2017, Arjovsky 2017, or Huang 2024 (R3GAN).",
    )
    r1: LossWeight = field(
        1.0, "Weight of the squared gradient at real pictures (Mescheder et al. 2018), halved."
    )
    r2: LossWeight = field(0.0, "The same at generated pictures; R3GAN uses both.")
    gradient_penalty: LossWeight = field(
        0.0,
        "Weight of WGAN-GP's penalty between real and generated pictures (Gulrajani et al. 2017); "
        "10 is usual.",
    )
    penalty_every: int = field(
        8, "Steps between penalties, each then this many times as heavy.", ge=1, le=10_000
    )
    augment: list[Literal["color", "translation", "cutout"]] = field(
        [],
        "What the discriminator sees is changed in these ways (Zhao et al. 2020); for few "
        "pictures.",
        max_length=3,
    )
    generator_every: int = field(
        1,
        "The generator steps once for this many steps of the discriminator.",
        ge=1,
        le=10_000,
    )


class GanOptimizerConfig(OptimizerConfig):
    """The optimizers of both players."""

    learning_rate: LearningRate = field(1e-3, "Peak learning rate (1.0 for prodigy).")
    discriminator_lr: LearningRate | None = field(
        None, "Of the discriminator; null means learning_rate."
    )
    betas: tuple[Fraction, Fraction] = field((0.0, 0.99), "Adam's running averages.")
    weight_decay: float = field(0.0, "Decoupled weight decay.", ge=0, le=10)


class GanValidationConfig(ValidationConfig):
    """How often the generator is sampled, and what it is measured in."""

    features: Literal["classifier", "dino", "inception"] = field(
        "classifier",
        "What FID and the like are measured in: a classifier of your labels, DINOv2 from the "
        "Hub's cache, or Inception.",
    )


class GanConfig(ScratchConfig):
    """A generative adversarial network from scratch."""

    kind: Literal["gan"] = field("gan", "Which trainer runs.")
    output_dir: PathField = field(
        Path("runs/gan"), "The run folder: everything that the run writes."
    )
    model: GanModelConfig = GanModelConfig()
    objective: GanObjectiveConfig = GanObjectiveConfig()
    optimizer: GanOptimizerConfig = GanOptimizerConfig()
    validation: GanValidationConfig = GanValidationConfig()

    optional_packages: ClassVar[Mapping[str, Mapping[str, str]]] = {
        **ScratchConfig.optional_packages,
        "validation.features": {"inception": "torch_fidelity"},
    }

    @property
    def can_accumulate(self) -> bool:
        return False

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        return self.held_out_metrics("held_out_kid", "held_out_precision", "held_out_recall")

    def errors(self) -> Errors:
        yield from super().errors()
        data = self.data
        if self.train.train_batch_size < 2:
            message = (
                "must be at least 2, because the diversity of the pictures in a batch is monitored"
            )
            yield "train.train_batch_size", message
        if data.resolution not in (28, 32, 64):
            yield "data.resolution", f"must be 28, 32 or 64, not {data.resolution}"
        if self.model.conditional and data.label_column is None:
            yield "model.conditional", "requires class labels: set data.label_column"
        if self.model.conditional and data.only_label is not None:
            message = "cannot be combined with data.only_label: there is one class"
            yield "model.conditional", message
        is_classifier = self.validation.features == "classifier"
        if is_classifier and data.holds_out and data.label_column is None:
            message = "a classifier requires data.label_column; dino and inception do not"
            yield "validation.features", message
        if self.objective.loss == "wasserstein" and not self.objective.gradient_penalty:
            message = (
                "the wasserstein loss requires a gradient penalty: set a weight, for example 10"
            )
            yield "objective.gradient_penalty", message
