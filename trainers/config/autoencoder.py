"""The config of the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainers.config.base_rules import Errors, SpecialKeys, irrelevant_keys
from trainers.config.base_sections import Section, field
from trainers.config.bounds import Channels, CodeSize, LossWeight, NoiseLevel, PathField
from trainers.config.from_scratch import ScratchConfig


class AutoencoderModelConfig(Section):
    """The size of the autoencoder and of its codes."""

    latent_dim: CodeSize = field(32, "Numbers in the code of a picture.")
    width: Channels = field(32, "Channels of the first level; doubled at each further one.")
    variational: bool = field(
        False, "The encoder gives a Gaussian, not a point (Kingma and Welling 2014)."
    )


class AutoencoderObjectiveConfig(Section):
    """What the autoencoder has to undo, and how its codes are kept in bounds."""

    noise: NoiseLevel = field(
        0.3, "denoise: standard deviation of the noise; pictures are in 0..1."
    )
    hidden: float = field(
        0.5, "anomaly: share of patches of 4 x 4 pixels that are hidden.", gt=0, lt=1
    )
    kl_weight: LossWeight = field(
        0.001, "variational: weight of the divergence from the unit Gaussian, per number."
    )


KEYS_BY_USE = [
    SpecialKeys(["denoise"], "objective", ["noise"]),
    SpecialKeys(["anomaly"], "objective", ["hidden"]),
]


class AutoencoderConfig(ScratchConfig):
    """An autoencoder from scratch: short codes, less noise, or anomalies."""

    kind: Literal["autoencoder"] = field("autoencoder", "Which trainer runs.")
    output_dir: PathField = field(
        Path("runs/autoencoder"), "The run folder: everything that the run writes."
    )
    use: Literal["reconstruct", "denoise", "anomaly"] = field(
        "reconstruct", "What the model is for."
    )
    model: AutoencoderModelConfig = AutoencoderModelConfig()
    objective: AutoencoderObjectiveConfig = AutoencoderObjectiveConfig()

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        pictures = self.held_out_metrics("held_out_psnr", "held_out_ssim")
        if self.use != "anomaly":
            return pictures
        auroc = self.held_out_metrics("held_out_auroc")
        if self.data.label_column is None:
            lacking = "data.label_column and data.only_label, which say what is no anomaly"
            return pictures | dict.fromkeys(auroc, lacking)
        return auroc | pictures

    def errors(self) -> Errors:
        yield from super().errors()
        yield from irrelevant_keys(self, self.use, KEYS_BY_USE)
        if not self.model.variational:
            special = SpecialKeys(["model.variational"], "objective", ["kl_weight"])
            yield from irrelevant_keys(self, "a plain autoencoder", [special])
        # the encoder halves the sides until they are 4 to 7 pixels long
        multiple = 2 ** max(1, (self.data.resolution // 4).bit_length() - 1)
        if self.data.resolution % multiple:
            yield "data.resolution", f"must be a multiple of {multiple}, not {self.data.resolution}"
        has_classes = self.data.label_column is not None and self.data.only_label is None
        if self.use == "anomaly" and has_classes:
            yield "data.only_label", "anomaly detection trains on one class: set which one"
