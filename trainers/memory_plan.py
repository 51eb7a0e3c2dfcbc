"""How much memory a DreamBooth run will take, counted without a weight: each phase is played with
tensors that have shapes and no content.

The step is the real one, with its LoRA, its optimiser and its saved activations. Weights in 8 and 4
bits, and those that wait in the CPU's memory, are taken off by their number. Measured beside real
runs in docs/performance.md.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainers.config import DreamBoothConfig, ModelConfig
from trainers.distributed.fsdp import get_blocks
from trainers.efficiency.compilation import enable_checkpointing
from trainers.efficiency.modulation import adaptive_norms
from trainers.errors import UserError
from trainers.families import FAMILIES, Family
from trainers.lora.layers import add_lora
from trainers.training.loop import Player, train
from trainers.training.optimizers import make_optimizer

# bytes of a weight; nf4 has a float32 scale for each 64
BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside: `live_bytes` now, and `peak_bytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            # a meta tensor holds nothing
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.count(tensor.untyped_storage())
        return outputs

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live_bytes -= size


@dataclass
class MemoryPlan:
    """Bytes at the peak of each phase, and the FLOPs of a step in one process."""

    phases: dict[str, int]
    flops: int

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())


def plan_memory(config: DreamBoothConfig, dtype: torch.dtype, has_cpu_memory: bool) -> MemoryPlan:
    """dtype: of the frozen base; has_cpu_memory: whether there is a CPU's memory beside the
    accelerator's. Raises: UserError."""
    model = config.model.model_copy(
        update={"pretrained_model_name_or_path": str(download_configs(config.model))}
    )
    family = FAMILIES[model.family](model, dtype=dtype if config.lora else torch.float32)
    family.load()
    phases = {"encode": encoding_peak(family, config)} if config.data.cache else {}
    phases["train"], flops = training_peak(family, config, has_cpu_memory)
    if config.validation.prompts:
        weights = size_in_bytes(
            family.meta_model(family.denoiser_name), family.dtype
        ) - saved_bytes(family, config, has_cpu_memory)
        phases["sample"] = weights + decoding_peak(family, config)
    return MemoryPlan(phases, flops)


def download_configs(model: ModelConfig) -> Path:
    """A folder with the base's configs and tokenizers; of the Hub's, these alone are fetched."""
    name = model.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(
                name, revision=model.revision, allow_patterns=["*.json", "*.txt", "*.model"]
            )
        )
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        raise UserError(
            f"model.pretrained_model_name_or_path: no configs of {name!r} to be had ({error})"
        ) from error


def training_peak(
    family: Family, config: DreamBoothConfig, has_cpu_memory: bool
) -> tuple[int, int]:
    """Peak and FLOPs of two steps, the second with the optimiser's state; the autoencoder is there
    for samples."""
    denoiser = (
        family.new_meta_model(family.denoiser_name).to(family.dtype).requires_grad_(not config.lora)
    )
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    if config.lora:
        add_lora(family, config.lora, ())
    enable_checkpointing(denoiser, config.train.gradient_checkpointing)
    rows = config.train.train_batch_size * (2 if config.data.uses_prior else 1)
    side = config.data.resolution // family.vae_scale_factor
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter:
        denoiser.to_empty(device="cpu").train()
        x = torch.empty(rows, family.vae_config["latent_channels"], side, side)
        task, accelerator = (
            SimulatedTask(family, config, x, empty_condition(family, rows)),
            Accelerator(cpu=True),
        )
        counter = FlopCounterMode(display=False)
        for step, context in enumerate(
            (counter, nullcontext())
        ):  # it holds on to what checkpointing would let go
            meter.peak_bytes = meter.live_bytes
            one_step = config.train.model_copy(update={"max_train_steps": step + 1})
            with context:
                train(
                    task,
                    lambda step: [(None, None)],
                    one_step,
                    0,
                    accelerator,
                    lambda step: 0.0,
                    start=step,
                )
        peak = meter.peak_bytes - saved_bytes(family, config, has_cpu_memory)
    vae = (
        size_in_bytes(family.meta_model("vae"), torch.float32)
        if config.validation.prompts or not config.data.cache
        else 0
    )
    family.unload()
    return peak + vae, counter.get_total_flops()


class SimulatedTask:
    """The task of the loop, with one batch for all steps."""

    def __init__(
        self, family: Family, config: DreamBoothConfig, x: Tensor, condition: dict[str, Tensor]
    ) -> None:
        self.family, self.x, self.condition = family, x, condition
        groups = [
            {"params": [p for p in family.denoiser.parameters() if p.requires_grad], "lr": 0.0}
        ]
        adamw = config.optimizer.model_copy(
            update={"name": "adamw"}
        )  # others have less, and look at what they compute
        self.players = {"denoiser": Player(family.denoiser, make_optimizer(adamw, groups))}

    def losses(self, batch: None, rng: None) -> Iterator[tuple[str, Tensor]]:
        family, t = self.family, torch.full((len(self.x),), self.family.probe_time)
        with torch.autocast(
            "cpu", family.dtype, enabled=family.needs_autocast and family.dtype != torch.float32
        ):
            prediction = family.predict(family.denoiser, self.x.to(family.dtype), t, self.condition)
        yield "denoiser", prediction.float().square().mean()


def empty_condition(family: Family, rows: int) -> dict[str, Tensor]:
    """What the text encoders give, empty."""
    shape, words = family.denoiser_config, family.pipe.tokenizer.model_max_length
    if family.t5_encoder is None:
        return {
            "encoder_hidden_states": torch.empty(
                rows, words, shape["cross_attention_dim"], dtype=family.dtype
            )
        }
    words = family.max_sequence_length + (words if len(family.clip_encoders) > 1 else 0)
    return {
        "encoder_hidden_states": torch.empty(
            rows, words, shape["joint_attention_dim"], dtype=family.dtype
        ),
        "pooled_projections": torch.empty(rows, shape["pooled_projection_dim"], dtype=family.dtype),
    }


def encoding_peak(family: Family, config: DreamBoothConfig) -> int:
    """Of the largest encoder; of the autoencoder, with what it computes."""
    texts = [
        size_in_bytes(family.meta_model(name), family.dtype) for name in family.text_encoder_names
    ]
    pixels = (1, 3, config.data.resolution, config.data.resolution)
    return max(
        *texts,
        peak_of_call(family.new_meta_model("vae"), lambda vae: vae.encode(torch.empty(pixels))),
    )


def decoding_peak(family: Family, config: DreamBoothConfig) -> int:
    side = config.data.resolution // family.vae_scale_factor
    latents = (1, family.vae_config["latent_channels"], side, side)
    return peak_of_call(family.new_meta_model("vae"), lambda vae: vae.decode(torch.empty(latents)))


def peak_of_call(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter:
        call(module.to_empty(device="cpu"))
        return meter.peak_bytes


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of several: what the matrix units of this machine
    give."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / time_call(lambda: a @ b, device) for _ in range(12))


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is through."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def size_in_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize


def saved_bytes(family: Family, config: DreamBoothConfig, has_cpu_memory: bool) -> int:
    """Bytes that are not there: of weights in fewer bits, and of blocks and adaptive norms in the
    CPU's memory."""
    model, total = family.meta_model(family.denoiser_name), 0
    if config.model.quantization != "none":
        linears = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and family.facts.is_in_block(name)
            if config.model.quantization != "fp8"
            or "norm" not in name  # as diffusers' layerwise casting
        ]
        bytes_saved = family.dtype.itemsize - BYTES_PER_WEIGHT[config.model.quantization]
        total += int(sum(layer.weight.numel() for layer in linears) * bytes_saved)
        total -= (
            max(layer.weight.numel() for layer in linears) * family.dtype.itemsize
        )  # one at a time is whole
    offloaded: set[nn.Parameter] = set()
    if config.model.modulation_cache and has_cpu_memory:
        for norm in adaptive_norms(model, family.facts.adaptive_norms).values():
            offloaded.update(norm.linear.parameters())
    if config.model.offload and has_cpu_memory:
        blocks = [set(block.parameters()) - offloaded for block in get_blocks(model)]
        offloaded.update(*sorted(blocks, key=lambda block: sum(p.numel() for p in block))[:-2])
    return total + sum(p.numel() for p in offloaded) * family.dtype.itemsize
