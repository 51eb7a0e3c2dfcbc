"""Runs on a pretended GPU: every trainer, family, precision and memory option, by short cases."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared import runs, unets
from tests.shared.pretended_tensors import PretendedMemory
from trainers.config import Config, loading

LOG_EVERY = 3  # steps; a run has twice as many, and goes on once from half of them
WHOLE = f"tracking.log_every={LOG_EVERY} train.max_train_steps={2 * LOG_EVERY} "
CLASS = "data.class_prompt=c data.num_class_images=2 "
SHOWN = f"validation.prompts=[a] validation.num_images=1 validation.validation_steps={LOG_EVERY} "
COMMON = f"{WHOLE}checkpoint.checkpointing_steps={LOG_EVERY} "

# family, precision, options
PLAIN = {
    "sd15-bf16": CLASS + SHOWN,
    "sdxl-fp16": CLASS + SHOWN,
    "sd3-fp16": CLASS + SHOWN,
    "flux-no": CLASS + SHOWN,
}
OPTIONS = {
    "sd15-fp16-text-encoder": "train.train_text_encoder=true optimizer.text_encoder_lr=1e-3 "
    "model.clip_chunks=2 train.ema_decay=0.9 " + SHOWN,
    "sd15-bf16-concepts-buckets-masks": "{concepts} data.resolution=[16,24] data.random_flip=true "
    "objective.snr_gamma=5 objective.noise_offset=0.1 data.cache_variants=2 "
    "train.gradient_accumulation_steps=2",
    "sd15-no-all-weights": "lora=null " + CLASS,
    "sd15-bf16-without-cache": "data.cache=false data.held_out_dir={others} "
    f"validation.validation_steps={LOG_EVERY} ",
    "sdxl-bf16-text-encoders-buckets": "{concepts} train.train_text_encoder=true "
    "data.resolution=[16,24] data.random_flip=true data.cache_variants=2 model.clip_chunks=2",
    "sd3-bf16-modulation-cache": "model.modulation_cache=true " + SHOWN,
    "sd3-fp16-offload": "model.offload=true train.gradient_checkpointing=true " + SHOWN,
    "sd3-bf16-text-encoder": "train.train_text_encoder=true optimizer.text_encoder_lr=1e-3 ",
    "flux-bf16-all-saved": "model.modulation_cache=true model.offload=true "
    "train.gradient_checkpointing=true train.ema_decay=0.9 " + CLASS + SHOWN,
    "flux-fp16-selective": "train.gradient_checkpointing=selective lora.use_dora=true",
    "flux-bf16-fp8": "model.quantization=fp8 train.gradient_checkpointing=true " + SHOWN,
    "flux-bf16-nf4": "model.quantization=nf4 ",
    "sd3-bf16-int8": "model.quantization=int8 train.gradient_checkpointing=true",
    "sd15-bf16-adamw-8bit": "optimizer.name=adamw_8bit",
    "sd15-bf16-adafactor": "optimizer.name=adafactor",
    "flux-bf16-prodigy": "optimizer.name=prodigy optimizer.learning_rate=1",
}
SMALL = {
    "autoencoder-no-denoise": "kind=autoencoder use=denoise {bars} model.latent_dim=4 "
    "data.resolution=16 data.random_flip=true train.ema_decay=0.9",
    "autoencoder-bf16-variational": "kind=autoencoder {bars} model.latent_dim=4 data.resolution=16 "
    "model.variational=true data.in_memory=false",
    "autoencoder-fp16-anomaly": "kind=autoencoder use=anomaly {bars} model.latent_dim=4 "
    "data.resolution=16 data.only_label=0",
    "gan-no": "kind=gan {bars} data.resolution=28 model.latent_dim=4 model.conditional=true "
    "objective.augment=[color,translation,cutout] objective.r2=0.5 objective.penalty_every=2 "
    "objective.generator_every=2 model.spectral_norm=true train.ema_decay=0.9",
    "gan-fp16": "kind=gan {bars} data.resolution=28 model.latent_dim=4 "
    "objective.gradient_penalty=10 objective.loss=wasserstein",
    "unet-bf16-segment": "use=segment {pairs} data.channels=1 data.crop=true data.elastic=2 "
    "data.random_flip=true data.random_rotate=true data.random_vertical_flip=true",
    "unet-fp16-colorize": "use=colorize {coloured} objective.rebalanced=true",
    "unet-no-pix2pix": "use=pix2pix {pairs} data.target_suffix=_target train.ema_decay=0.9",
    "unet-bf16-restore": "use=restore {coloured} data.in_memory=false data.crop=true",
}


@dataclass(frozen=True)
class Sources:
    """What runs learn from, and the folder that they go to."""

    bases: dict[str, Path]
    photos: Path
    others: Path
    bars: Path
    pairs: Path
    coloured: Path
    folder: Path

    def config(self, case: str, options: str, *overrides: str) -> Config:
        """The config of a case, FAMILY-PRECISION-... or KIND-PRECISION-..., with its options."""
        kind, precision, *_ = case.split("-")
        places = {
            "others": str(self.others),
            "bars": f"data.dataset_name={self.bars} data.label_column=label",
            "pairs": f"data.image_dir={self.pairs}",
            "coloured": f"data.image_dir={self.coloured}",
        }
        given = []
        for word in [*COMMON.split(), f"train.mixed_precision={precision}", *options.split()]:
            given += write_concepts(self.folder) if word == "{concepts}" else [word]
        given = " ".join(given)
        for name, value in places.items():
            given = given.replace(f"{{{name}}}", value)
        if kind in self.bases:
            make = runs.config_maker(self.bases, self.photos, self.folder)
            return make(*given.split(), *overrides, family=kind)
        path = unets.write_config(self.folder, self.coloured, resolution=16, steps=6)
        if kind != "unet":
            path.write_text(SMALL_CONFIG.format(folder=self.folder))
        return loading.load_config(path, [*given.split(), *overrides])


SMALL_CONFIG = """
output_dir: {folder}/run
model: {{width: 8}}
train: {{train_batch_size: 4}}
tracking: {{report_to: []}}
"""


@pytest.fixture
def sources(bases, photos, other_photos, bars, blobs, coloured, tmp_path):
    return Sources(bases, photos, other_photos, bars, blobs, coloured, tmp_path)


def write_concepts(folder: Path) -> list[str]:
    """Two sets of photos in two shapes, with masks and class pictures."""
    listed = []
    for name, shape in (("rex", (16, 20)), ("tom", (36, 12))):
        photos, masks = folder / name, folder / f"{name}_masks"
        if not photos.exists():
            photos.mkdir(), masks.mkdir()
            random = np.random.default_rng(0)
            for i in range(2):
                array = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
                Image.fromarray(array).save(photos / f"{i}.png")
                Image.fromarray(array[..., 0]).save(masks / f"{i}.png")
        concept = {"name": name, "instance_data_dir": str(photos), "mask_dir": str(masks)}
        concept |= {"instance_prompt": "ab", "class_prompt": "c", "num_class_images": 2}
        listed.append(concept)
    found = json.dumps(listed, separators=(",", ":"))
    return ["data.instance_data_dir=null", "data.instance_prompt=null", f"data.concepts={found}"]


# Where the host may wait between two lines of the log, and why.
ALLOWED_WAITS = {
    "training/optimizers.py:clip_and_step": "only AdamW can skip a step by itself; of the other "
    "optimizers' steps the host must know whether the gradient is finite",
}


def unexpected_waits(memory: PretendedMemory) -> dict[str, int]:
    """How often each place of the loop waited in steps after which nothing is due."""
    found: Counter[str] = Counter()
    for wait, count in memory.waits.items():
        is_due = wait.step is None or (wait.step + 1) % LOG_EVERY == 0
        if not is_due and wait.place not in ALLOWED_WAITS:
            found[f"{wait.place}: {wait.what}"] += count
    return found
