"""How much memory a DreamBooth run will take, counted without a weight.

Each phase is played with tensors that have shapes and no content. The step is the real one, with
its LoRA, its optimizer and its saved activations. Weights in 8 and 4 bits, and those that wait in
the CPU's memory, are taken off by their number. Of a GPU it is what tensors take: not its context
and not what the allocator keeps beyond them. docs/performance.md has it beside real runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainers.config import DreamBoothConfig, ModelConfig
from trainers.config.dreambooth_rules import is_single_file
from trainers.cpu_memory import resident_bytes
from trainers.distributed.fsdp import get_blocks
from trainers.efficiency.compilation import enable_checkpointing
from trainers.efficiency.modulation import adaptive_norms
from trainers.errors import UserError
from trainers.families import FAMILIES, Family
from trainers.lora.layers import add_lora
from trainers.original.convert import settings_folder
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
    """Play each phase of a run without weights.

    dtype: of the frozen base; has_cpu_memory: whether there is a CPU's memory beside the
    accelerator's. Where there is none, what the process takes beside its tensors is counted too.
    Raises: UserError.
    """
    folder = str(download_configs(config.model))
    model = config.model.model_copy(update={"pretrained_model_name_or_path": folder})
    family = FAMILIES[model.family](model, dtype=dtype if config.lora else torch.float32)
    family.load()
    phases = {}
    if config.data.cache:
        phases["encode"] = encoding_peak(family, config)
    phases["train"], flops = training_peak(family, config, has_cpu_memory)
    weights = size_in_bytes(family.meta_model(family.denoiser_name), family.dtype)
    weights -= saved_bytes(family, config, has_cpu_memory)
    if config.validation.draws_pictures:
        phases["sample"] = weights + decoding_peak(family, config)
    if not has_cpu_memory:
        # where all weights train, there are gradients and two averages as large
        phases = resident_bytes(phases, weights if config.lora else 4 * weights)
    return MemoryPlan(phases, flops)


def download_configs(model: ModelConfig) -> Path:
    """A folder with the base's configs and tokenizers; of the Hub's, these alone are fetched."""
    name = model.pretrained_model_name_or_path
    if is_single_file(name):
        return settings_folder(model)
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        raise UserError(
            f"model.pretrained_model_name_or_path: the configs of {name!r} cannot be fetched "
            f"({error})"
        ) from error


def training_peak(
    family: Family, config: DreamBoothConfig, has_cpu_memory: bool
) -> tuple[int, int]:
    """The peak and the FLOPs of two steps, the second of which has the optimizer's state.

    The autoencoder is counted where the run keeps it, for samples or instead of the cache.
    """
    denoiser = family.new_meta_model(family.denoiser_name).to(family.dtype)
    denoiser.requires_grad_(not config.lora)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    if config.lora:
        add_lora(family, config.lora, ())
    enable_checkpointing(denoiser, config.train.gradient_checkpointing)
    rows = config.train.train_batch_size * (2 if config.data.uses_prior else 1)
    side = config.data.max_resolution // family.vae_scale_factor
    with FakeTensorMode(allow_non_fake_inputs=True):
        condition = encode_nothing(family, rows)
        with MemoryMeter() as meter:
            denoiser.to_empty(device="cpu").train()
            x = torch.empty(rows, family.vae_config["latent_channels"], side, side)
            task = SimulatedTask(family, config, x, condition)
            counter = FlopCounterMode(display=False)
            # the counter holds on to what checkpointing would free: the second step is the peak
            with counter:
                task.train_step(0)
            meter.peak_bytes = meter.live_bytes
            task.train_step(1)
            peak = meter.peak_bytes
    peak -= saved_bytes(family, config, has_cpu_memory)
    if config.validation.draws_pictures or not config.data.cache:
        peak += size_in_bytes(family.meta_model("vae"), torch.float32)
    family.unload()
    return peak, counter.get_total_flops()


def encode_nothing(family: Family, rows: int) -> dict[str, Tensor]:
    """What the denoiser is called with for `rows` empty prompts, by text encoders without weights.

    The encoders are gone afterwards, as in a run.
    """
    text = {}
    for name in family.text_encoder_names:
        with unset_fake_temporarily():
            num_tokens = len(family.tokenize(name, ""))
            encoder = family.new_meta_model(name).to(family.dtype)
        family.pipe.register_modules(**{name: encoder.to_empty(device="cpu")})
        with torch.no_grad():
            text |= family.encode_ids(name, torch.zeros(rows, num_tokens, dtype=torch.long))
        family.pipe.register_modules(**{name: None})
    return {name: value.to(family.dtype) for name, value in family.condition(text).items()}


class SimulatedTask:
    """A task for the loop that has the same batch at each step."""

    def __init__(
        self, family: Family, config: DreamBoothConfig, x: Tensor, condition: dict[str, Tensor]
    ) -> None:
        self.family, self.config = family, config
        self.x, self.condition = x, condition
        self.accelerator = Accelerator(cpu=True)
        trained = [p for p in family.denoiser.parameters() if p.requires_grad]
        # the other optimizers keep less, and look at what they compute
        adamw = config.optimizer.model_copy(update={"name": "adamw", "arguments": {}})
        optimizer = make_optimizer(adamw, [{"params": trained, "lr": 0.0}])
        self.players = {"denoiser": Player(family.denoiser, optimizer)}

    def train_step(self, step: int) -> None:
        settings = self.config.train.model_copy(update={"max_train_steps": step + 1})
        batches = [(None, None)]
        train(self, lambda _: batches, settings, 0, self.accelerator, lambda _: 0.0, start=step)

    def losses(self, batch: None, rng: None) -> Iterator[tuple[str, Tensor]]:
        family = self.family
        t = torch.full((len(self.x),), family.probe_time)
        use_autocast = family.needs_autocast and family.dtype != torch.float32
        with torch.autocast("cpu", family.dtype, enabled=use_autocast):
            prediction = family.predict(family.denoiser, self.x.to(family.dtype), t, self.condition)
        yield "denoiser", prediction.float().square().mean()


def encoding_peak(family: Family, config: DreamBoothConfig) -> int:
    """The peak of the largest encoder, of the autoencoder with its activations."""
    pixels = (1, 3, config.data.max_resolution, config.data.max_resolution)
    vae = family.new_meta_model("vae")
    peaks = [peak_of_call(vae, lambda vae: vae.encode(torch.empty(pixels)))]
    for name in family.text_encoder_names:
        peaks.append(size_in_bytes(family.meta_model(name), family.dtype))
    return max(peaks)


def decoding_peak(family: Family, config: DreamBoothConfig) -> int:
    size = config.validation.largest_size(config.data.max_resolution)
    width, height = (side // family.vae_scale_factor for side in size)
    latents = (1, family.vae_config["latent_channels"], height, width)
    return peak_of_call(family.new_meta_model("vae"), lambda vae: vae.decode(torch.empty(latents)))


def peak_of_call(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter:
        call(module.to_empty(device="cpu"))
        return meter.peak_bytes


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / time_call(lambda: a @ b, device) for _ in range(12))


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """The seconds that a call takes, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def size_in_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return num_weights(module.parameters()) * dtype.itemsize


def num_weights(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def saved_bytes(family: Family, config: DreamBoothConfig, has_cpu_memory: bool) -> int:
    """Bytes of the denoiser that the memory options keep off the accelerator.

    They are of weights in fewer bits, and of blocks and adaptive norms in the CPU's memory.
    """
    denoiser = family.meta_model(family.denoiser_name)
    saved = 0
    if config.model.quantization != "none":
        saved += quantization_saves(family, denoiser, config.model.quantization)
    waiting: set[nn.Parameter] = set()
    if config.model.modulation_cache and has_cpu_memory:
        for norm in adaptive_norms(denoiser, family.facts.adaptive_norms).values():
            waiting.update(norm.linear.parameters())
    if config.model.offload and has_cpu_memory:
        blocks = [set(block.parameters()) - waiting for block in get_blocks(denoiser)]
        # two blocks at a time are on the accelerator
        waiting.update(*sorted(blocks, key=num_weights)[:-2])
    return saved + num_weights(waiting) * family.dtype.itemsize


def quantization_saves(family: Family, denoiser: nn.Module, method: str) -> int:
    """Bytes by which the blocks' linear layers shrink, less the largest of them, which is whole
    while it computes."""
    sizes = []
    for name, layer in denoiser.named_modules():
        # diffusers' layerwise casting leaves norms as they are
        is_left = method == "fp8" and "norm" in name
        if isinstance(layer, nn.Linear) and family.facts.is_in_block(name) and not is_left:
            sizes.append(layer.weight.numel())
    itemsize = family.dtype.itemsize
    return int(sum(sizes) * (itemsize - BYTES_PER_WEIGHT[method])) - max(sizes) * itemsize
