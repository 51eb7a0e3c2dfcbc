"""The config of the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainers.config.base_rules import Errors, SpecialKeys, folder_errors, irrelevant_keys
from trainers.config.base_sections import Section, ValidationConfig, field
from trainers.config.bounds import Channels, CodeSize, LossWeight, NoiseLevel, PathField
from trainers.config.from_scratch import ImagesConfig, ScratchConfig


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


class AutoencoderImagesConfig(ImagesConfig):
    """The pictures and, for anomalies, pictures with defects to measure with."""

    bad_dir: PathField | None = field(
        None,
        "anomaly: folder with pictures that have defects, those of each kind in a folder of its "
        "own, which are only measured with; masks as MVTec has them, in "
        "ground_truth/KIND/NAME_mask.png.",
    )

    @property
    def is_mvtec(self) -> bool:
        """Whether image_dir has MVTec's folders: train/good, test/good and test/KIND."""
        root = self.image_dir
        return root is not None and all((root / part).is_dir() for part in MVTEC_FOLDERS)

    @property
    def train_dir(self) -> Path | None:
        return self.image_dir / MVTEC_FOLDERS[0] if self.is_mvtec else self.image_dir

    @property
    def test_dir(self) -> Path | None:
        if not self.is_mvtec:
            return None
        folder = self.image_dir / MVTEC_FOLDERS[1] / GOOD
        return folder if folder.is_dir() else None

    @property
    def defects_dir(self) -> Path | None:
        """The folder that has one of each kind of defect, of bad_dir or else MVTec's own."""
        root = self.image_dir if self.bad_dir is None and self.is_mvtec else self.bad_dir
        if root is None:
            return None
        inner = root / MVTEC_FOLDERS[1]
        return inner if inner.is_dir() else root


class AutoencoderValidationConfig(ValidationConfig):
    """How often the model is sampled and measured, and how it tells what is strange."""

    scorer: Literal["patches", "reconstruction"] = field(
        "patches",
        "anomaly: patches: how far the encoder's features of each patch are from the nearest of "
        "good pictures (after Roth et al. 2022); reconstruction: how badly hidden patches are "
        "guessed.",
    )
    bank_size: int = field(
        1000, "anomaly, patches: patches of good pictures that are kept.", ge=1, le=200_000
    )
    threshold_quantile: float = field(
        0.99,
        "anomaly: a picture is called strange whose score is above this quantile of the scores of "
        "held-out good ones.",
        gt=0,
        le=1,
    )


GOOD = "good"
MVTEC_FOLDERS = ("train/good", "test")

KEYS_BY_USE = [
    SpecialKeys(["denoise"], "objective", ["noise"]),
    SpecialKeys(["anomaly"], "objective", ["hidden"]),
    SpecialKeys(["anomaly"], "data", ["bad_dir"]),
    SpecialKeys(["anomaly"], "validation", ["scorer", "bank_size", "threshold_quantile"]),
]
KEYS_BY_SCORER = [SpecialKeys(["patches"], "validation", ["bank_size"])]
WHAT_IS_BAD = (
    "data.bad_dir, a folder with pictures that have defects, or data.label_column and "
    "data.only_label of a data set, which say what is no anomaly"
)


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
    data: AutoencoderImagesConfig = AutoencoderImagesConfig()
    objective: AutoencoderObjectiveConfig = AutoencoderObjectiveConfig()
    validation: AutoencoderValidationConfig = AutoencoderValidationConfig()

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        pictures = self.held_out_metrics("held_out_psnr", "held_out_ssim")
        if self.use != "anomaly":
            return pictures
        auroc = self.held_out_metrics("held_out_auroc")
        lacking = [missing] if (missing := auroc["held_out_auroc"]) else []
        if self.data.label_column is None and self.data.defects_dir is None:
            lacking.append(WHAT_IS_BAD)
        if lacking:
            return pictures | {"held_out_auroc": "; and ".join(lacking)}
        return auroc | pictures

    def errors(self) -> Errors:
        yield from super().errors()
        yield from irrelevant_keys(self, self.use, KEYS_BY_USE)
        if self.use == "anomaly":
            yield from irrelevant_keys(self, self.validation.scorer, KEYS_BY_SCORER)
            yield from self.defect_errors()
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

    def defect_errors(self) -> Errors:
        """What contradicts the folders with defects."""
        data = self.data
        yield from folder_errors("data.bad_dir", data.bad_dir)
        if data.test_dir is not None and data.folds is not None:
            yield "data.folds", f"{data.test_dir} is held out already: set data.folds to null"
        if data.bad_dir is not None and data.train_dir is not None:
            good, bad = data.train_dir.resolve(), data.defects_dir.resolve()
            if bad.is_relative_to(good):
                message = (
                    f"lies in {data.train_dir}, whose pictures are all learnt as good ones: move "
                    "it out of there"
                )
                yield "data.bad_dir", message
            elif good.is_relative_to(bad):
                yield "data.bad_dir", f"holds the good pictures of data.image_dir: {data.train_dir}"
