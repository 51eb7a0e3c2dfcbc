"""The sections of a config as frozen, typed models: every key with its default, help and limits,
and the rules between.

Nothing here imports torch or diffusers, so that a typo is reported in a second.
"""

from __future__ import annotations

from trainers.config.base import Config, OptimizerConfig, TrainConfig
from trainers.config.dreambooth import DreamBoothConfig
from trainers.config.dreambooth_sections import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptsConfig,
)
from trainers.config.from_scratch import (
    AutoencoderConfig,
    GanConfig,
    ImagesConfig,
    PairsConfig,
    ScratchConfig,
)
from trainers.config.unet import UNetConfig

KINDS: dict[str, type[Config]] = {
    "dreambooth": DreamBoothConfig,
    "autoencoder": AutoencoderConfig,
    "gan": GanConfig,
    "unet": UNetConfig,
}
