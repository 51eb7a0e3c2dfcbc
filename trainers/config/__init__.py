"""The configs as frozen, typed models: every key with its default, help, limits and rules.

Nothing here imports torch or diffusers, so that a typo is reported in a second.
"""

from __future__ import annotations

from trainers.config.autoencoder import AutoencoderConfig
from trainers.config.base import Config
from trainers.config.base_sections import OptimizerConfig, TrainConfig
from trainers.config.dreambooth import DreamBoothConfig
from trainers.config.dreambooth_data import DataConfig
from trainers.config.dreambooth_sections import ModelConfig, PromptsConfig
from trainers.config.from_scratch import ImagesConfig, ScratchConfig
from trainers.config.gan import GanConfig
from trainers.config.lora_section import LoraConfig
from trainers.config.objective import ObjectiveConfig
from trainers.config.photo_sections import ConceptConfig, PhotoSet
from trainers.config.unet import PairsConfig, UNetConfig

KINDS: dict[str, type[Config]] = {
    "dreambooth": DreamBoothConfig,
    "autoencoder": AutoencoderConfig,
    "gan": GanConfig,
    "unet": UNetConfig,
}
