"""What the config asks for, applied to a family's denoiser."""

from __future__ import annotations

import diffusers
import torch
from accelerate import Accelerator
from torch import nn

from trainers.config import ModelConfig
from trainers.config.dreambooth_sections import DreamBoothTrainConfig
from trainers.distributed import deepspeed
from trainers.distributed.fsdp import ShardFunction, get_blocks
from trainers.efficiency.compilation import compile_blocks, enable_checkpointing
from trainers.efficiency.modulation import ModulationCache
from trainers.efficiency.offload import BlockOffload
from trainers.efficiency.quantize import load_quantized
from trainers.errors import UserError
from trainers.families import FAMILIES, Family


class DenoiserMemory:
    """How one denoiser needs less memory: the `MemoryOptions` of a config.

    shard: cuts the frozen weights among the processes, see `distributed.fsdp`.
    """

    def __init__(self, model: ModelConfig, shard: ShardFunction | None = None) -> None:
        self.model, self.shard = model, shard
        self.loads_denoiser = model.quantization in ("nf4", "int8")
        # what `apply` moves to the device itself, since parts of it stay in the CPU's memory
        self.moves_denoiser = model.modulation_cache or model.offload or model.quantization == "fp8"
        self.places_denoiser = self.loads_denoiser or self.moves_denoiser or shard is not None

    def load_denoiser(self, base: Family) -> nn.Module:
        """In 4 or 8 bits."""
        _, class_name = base.components[base.denoiser_name]
        return load_quantized(base, getattr(diffusers, class_name), self.model.quantization)

    def apply(self, base: Family) -> ModulationCache | None:
        """Leave adaptive norms' weights out; cut, cast or offload the rest.

        With fp8 the weights are 8 bits wide from now on except while their layer computes; LoRA's
        are not. What a layer saves for the backward pass is gone by then, so only checkpointed
        blocks can train.
        """
        denoiser = base.denoiser
        modulation = None
        if self.model.modulation_cache:
            modulation = ModulationCache(denoiser, base.facts.adaptive_norms, base.device)
        if self.shard:
            self.shard(denoiser)
        if self.model.quantization == "fp8":
            denoiser.enable_layerwise_casting(torch.float8_e4m3fn, base.dtype)
        if self.model.offload:
            BlockOffload(get_blocks(denoiser), base.device)
        if self.moves_denoiser and not self.shard:
            denoiser.to(base.device)
        return modulation


def open_family(
    model: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shard: ShardFunction | None = None,
) -> Family:
    """The family of `model` with the memory options that its section of the config asks for."""
    return FAMILIES[model.family](model, device, dtype, DenoiserMemory(model, shard))


def configure_blocks(
    family: Family, train: DreamBoothTrainConfig, accelerator: Accelerator
) -> None:
    """Checkpoint and compile the denoiser's blocks as `train` asks for. Raises: UserError."""
    enable_checkpointing(family.denoiser, train.gradient_checkpointing)
    if not train.compile:
        return
    if family.memory.shard is not None or deepspeed.zero_stage(accelerator):
        raise UserError("train.compile: cannot be combined with FSDP2 or DeepSpeed: remove it")
    compile_blocks(family.denoiser)
