"""How much memory a DreamBooth run will take, counted without a weight: each phase is played with tensors that have
shapes and no content.

The step is the real one, with its LoRA, its optimiser and its saved activations. Weights in 8 and 4 bits, and those
that wait in the CPU's memory, are taken off by their number. Measured beside real runs in docs/performance.md.
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
from trainers.distributed.fsdp import blocks_of
from trainers.efficiency.compilation import checkpointed
from trainers.efficiency.modulation import ADAPTIVE
from trainers.errors import UserError
from trainers.families import FAMILIES, Family
from trainers.training.loop import Player, train
from trainers.training.optimizers import make_optimizer

NARROW = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}  # bytes of a weight; nf4 has a float32 scale for each 64


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside: `live` now, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":  # as of skeletons, which hold nothing
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@dataclass
class Plan:
    """Bytes at the peak of each phase, and the FLOPs of a step in one process."""

    phases: dict[str, int]
    flops: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def plan(config: DreamBoothConfig, dtype: torch.dtype, away: bool) -> Plan:
    """dtype: of the frozen base; away: whether there is a CPU's memory beside the accelerator's. Raises: UserError."""
    model = config.model.model_copy(update={"pretrained_model_name_or_path": str(described(config.model))})
    family = FAMILIES[model.family](model, dtype=dtype if config.lora else torch.float32)
    family.load()
    phases = {"encode": encoding(family, config)} if config.data.cache else {}
    phases["train"], flops = training(family, config, away)
    if config.validation.prompts:
        weights = size(family.skeleton(family.denoiser_name), family.dtype) - saved(family, config, away)
        phases["sample"] = weights + decoding(family, config)
    return Plan(phases, flops)


def described(model: ModelConfig) -> Path:
    """A folder with the base's configs and tokenizers; of the Hub's, these alone are fetched."""
    name = model.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=["*.json", "*.txt", "*.model"]))
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        raise UserError(f"model.pretrained_model_name_or_path: no configs of {name!r} to be had ({error})") from error


def training(family: Family, config: DreamBoothConfig, away: bool) -> tuple[int, int]:
    """Peak and FLOPs of two steps, the second with the optimiser's state; the autoencoder is there for samples."""
    denoiser = family.fresh(family.denoiser_name).to(family.dtype).requires_grad_(not config.lora)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    if config.lora:
        family.add_lora(config.lora, ())
    checkpointed(denoiser, config.train.gradient_checkpointing)
    rows = config.train.train_batch_size * (2 if config.data.prior else 1)
    side = config.data.resolution // family.vae_factor
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        denoiser.to_empty(device="cpu").train()
        x = torch.empty(rows, family.vae_config["latent_channels"], side, side)
        task, accelerator = Played(family, config, x, condition(family, rows)), Accelerator(cpu=True)
        counter = FlopCounterMode(display=False)
        for step, watch in enumerate((counter, nullcontext())):  # it holds on to what checkpointing would let go
            meter.peak = meter.live
            once = config.train.model_copy(update={"max_train_steps": step + 1})
            with watch:
                train(task, lambda step: [(None, None)], once, 0, accelerator, lambda step: 0.0, start=step)
        peak = meter.peak - saved(family, config, away)
    vae = size(family.skeleton("vae"), torch.float32) if config.validation.prompts or not config.data.cache else 0
    family.release()
    return peak + vae, counter.get_total_flops()


class Played:
    """The task of the loop, with one batch for all steps."""

    def __init__(self, family: Family, config: DreamBoothConfig, x: Tensor, given: dict[str, Tensor]) -> None:
        self.family, self.x, self.given = family, x, given
        groups = [{"params": [p for p in family.denoiser.parameters() if p.requires_grad], "lr": 0.0}]
        adamw = config.optimizer.model_copy(update={"name": "adamw"})  # others have less, and look at what they compute
        self.players = {"denoiser": Player(family.denoiser, make_optimizer(adamw, groups))}

    def losses(self, batch: None, rng: None) -> Iterator[tuple[str, Tensor]]:
        family, t = self.family, torch.full((len(self.x),), self.family.middle)
        with torch.autocast("cpu", family.dtype, enabled=family.mixed and family.dtype != torch.float32):
            prediction = family.predict(family.denoiser, self.x.to(family.dtype), t, self.given)
        yield "denoiser", prediction.float().square().mean()


def condition(family: Family, rows: int) -> dict[str, Tensor]:
    """What the text encoders give, empty."""
    shape, words = family.denoiser_config, family.pipe.tokenizer.model_max_length
    if family.t5_encoder is None:
        return {"encoder_hidden_states": torch.empty(rows, words, shape["cross_attention_dim"], dtype=family.dtype)}
    words = family.max_sequence_length + (words if len(family.clip_encoders) > 1 else 0)
    return {
        "encoder_hidden_states": torch.empty(rows, words, shape["joint_attention_dim"], dtype=family.dtype),
        "pooled_projections": torch.empty(rows, shape["pooled_projection_dim"], dtype=family.dtype),
    }


def encoding(family: Family, config: DreamBoothConfig) -> int:
    """Of the largest encoder; of the autoencoder, with what it computes."""
    texts = [size(family.skeleton(name), family.dtype) for name in family.text_encoder_names]
    pixels = (1, 3, config.data.resolution, config.data.resolution)
    return max(*texts, played(family.fresh("vae"), lambda vae: vae.encode(torch.empty(pixels))))


def decoding(family: Family, config: DreamBoothConfig) -> int:
    side = config.data.resolution // family.vae_factor
    latents = (1, family.vae_config["latent_channels"], side, side)
    return played(family.fresh("vae"), lambda vae: vae.decode(torch.empty(latents)))


def played(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        call(module.to_empty(device="cpu"))
        return meter.peak


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of several: what the matrix units of this machine give."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / timed(lambda: a @ b, device) for _ in range(12))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is through."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def size(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize


def saved(family: Family, config: DreamBoothConfig, away: bool) -> int:
    """Bytes that are not there: of weights in fewer bits, and of blocks and adaptive norms in the CPU's memory."""
    model, total = family.skeleton(family.denoiser_name), 0
    if config.model.quantization != "none":
        linears = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and "blocks." in name
            if config.model.quantization != "fp8" or "norm" not in name  # as diffusers' layerwise casting
        ]
        narrow = family.dtype.itemsize - NARROW[config.model.quantization]
        total += int(sum(layer.weight.numel() for layer in linears) * narrow)
        total -= max(layer.weight.numel() for layer in linears) * family.dtype.itemsize  # one at a time is whole
    gone: set[nn.Parameter] = set()
    if config.model.modulation_cache and away:
        gone.update(p for norm in model.modules() if isinstance(norm, ADAPTIVE) for p in norm.linear.parameters())
    if config.model.offload and away:
        blocks = [set(block.parameters()) - gone for block in blocks_of(model)]
        gone.update(*sorted(blocks, key=lambda block: sum(p.numel() for p in block))[:-2])
    return total + sum(p.numel() for p in gone) * family.dtype.itemsize
