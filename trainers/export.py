"""The files of a run that leave home, with LoRA's scale folded in, and the proof that they reload."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .cache import CachedEncoder
from .card import versions
from .families import FAMILIES, Family
from .formats import from_peft
from .lora_files import KOHYA_NAME, WEIGHT_NAME, distance, header_of, layers_of, read_lora, text_prefix, write_kohya
from .sections import DreamBoothConfig

Encode = Callable[[str, str], dict[str, Tensor]]  # a text encoder's name and a prompt to its outputs
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the reloaded output, relative L2
ARCHITECTURE = {"sd15": "stable-diffusion-v1", "sd3": "stable-diffusion-3-5", "flux": "flux-1-dev"}  # modelspec's names


class ExportError(RuntimeError):
    """The written file is not what was trained: a fault of the toolkit, never of the user."""


def lora_state(module: nn.Module, prefix: str = "", adapter: str = "default") -> dict[str, Tensor]:
    """LoRA tensors by PEFT name, float32, with the scale folded into lora_B so that alpha = rank.

    Readers disagree about where alpha is written; a file whose scale is one is right for all of them.
    """
    config = module.peft_config[adapter]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    state = {}
    for name, tensor in get_peft_model_state_dict(module, adapter_name=adapter).items():
        tensor = tensor.detach().float()
        state[prefix + name] = (tensor * scale if ".lora_B" in name else tensor).cpu().contiguous()
    return state


def lora_metadata(module: nn.Module) -> dict:
    """The PEFT config that fits `lora_state`."""
    config = module.peft_config["default"].to_dict() | {"use_rslora": False}
    config["lora_alpha"] = config["r"]
    config["lora_dropout"] = 0.0  # diffusers leaves freshly loaded LoRA layers in training mode
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save_lora(family: Family, text_encoders: Sequence[str], folder: Path, config: DreamBoothConfig) -> None:
    """Write pytorch_lora_weights.safetensors, and kohya's if the config wants it, aside first and then renamed."""
    packed, state, facts = {}, {}, header(config)
    for name in (family.denoiser_name, *text_encoders):
        module = getattr(family.pipe, name)
        packed[f"{name}_lora_layers"] = own = lora_state(module, text_prefix(module))
        packed[f"{name}_lora_adapter_metadata"] = lora_metadata(module)
        state |= {f"{name}.{key}": value for key, value in own.items()}
    with TemporaryDirectory(dir=folder) as aside:
        file = Path(aside) / WEIGHT_NAME
        family.pipeline.save_lora_weights(aside, **packed)
        save_file(load_file(file), file, header_of(file) | facts)
        file.replace(folder / WEIGHT_NAME)
        if config.kohya:
            write_kohya(from_peft(state, {}), layers_of(family), config.model.family, Path(aside) / KOHYA_NAME, facts)
            (Path(aside) / KOHYA_NAME).replace(folder / KOHYA_NAME)


def header(config: DreamBoothConfig) -> dict[str, str]:
    """What a file tells of itself: modelspec's keys (Stability AI, 1.0.1), and the config and versions to repeat it."""
    model, size = config.model, config.data.resolution
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURE[model.family]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.output_dir.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": date.today().isoformat(),
        "modelspec.trigger_phrase": config.data.instance_prompt or "",
        "diffusion_trainers.config": config.model_dump_json(exclude={"hub", "tracking", "checkpoint"}),
        "diffusion_trainers.versions": json.dumps(versions()),
    }


def save_pipeline(family: Family, text_encoders: Sequence[str], folder: Path) -> None:
    """The whole pipeline with the trained weights, in the diffusers layout."""
    trained = {name: getattr(family.pipe, name) for name in (family.denoiser_name, *text_encoders)}
    pipe = family.pipeline.from_pretrained(family.folder, variant=family.variant, **trained)
    pipe.save_pretrained(folder)


@torch.no_grad()
def probe(family: Family, resolution: int, text: dict[str, Tensor], denoise: Callable[..., Tensor]) -> Tensor:
    """The output (1, C, h, w) of `denoise` on fixed noise, in the middle of the schedule, for one prompt's `text`."""
    size, channels = resolution // family.vae_factor, family.vae_config["latent_channels"]
    x_t = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(family.device)
    t = torch.full((1,), family.middle, device=family.device)
    text = {name: value[None].to(family.device) for name, value in text.items()}
    with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
        return denoise(x_t, t, text).float()


def prove(
    config: DreamBoothConfig, encoder: CachedEncoder, expected: Tensor, prompt: str
) -> tuple[Family, Encode, float]:
    """Load the exported file into a fresh base as any user would, and compare it with the training's last state.

    Returns the fresh family, how it encodes prompts, and the relative difference of the outputs. Raises: ExportError.
    """
    folder, model, dtype = config.output_dir, config.model, encoder.family.dtype
    if not config.lora:
        model = model.model_copy(update={"pretrained_model_name_or_path": str(folder / "pipeline"), "variant": None})
    fresh = FAMILIES[model.family](model, encoder.family.device, dtype, encoder.family.shard)
    fresh.load("vae", fresh.denoiser_name, *encoder.live)
    if config.lora:
        fresh.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
        check_keys(fresh, (fresh.denoiser_name, *encoder.train), folder / WEIGHT_NAME)
    if config.kohya:
        far = distance(read_lora(folder / WEIGHT_NAME, fresh), read_lora(folder / KOHYA_NAME, fresh))
        if not far <= TOLERANCE[torch.float32]:
            raise ExportError(f"{KOHYA_NAME} reads back as other updates: relative difference {far:.2e}")
    fresh.settle()
    fresh.mixed = encoder.family.mixed  # so that only the weights are compared, not how they are computed with

    def encode(name: str, prompt: str) -> dict[str, Tensor]:
        return fresh.encode_prompt(name, prompt) if name in encoder.live else encoder.outputs(name, prompt)

    text = {key: value for name in fresh.text_encoder_names for key, value in encode(name, prompt).items()}
    output = probe(fresh, config.data.resolution, text, partial(fresh.denoise, fresh.denoiser))
    difference = ((output - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE[dtype]:
        raise ExportError(f"the reloaded weights give another output: relative difference {difference:.2e}")
    return fresh, encode, difference


def check_keys(fresh: Family, names: Sequence[str], file: Path) -> None:
    """Every tensor in the file must have found its layer. Raises: ExportError."""
    written, loaded = load_file(file), {}
    for name in names:
        module = getattr(fresh.pipe, name)
        prefix = f"{name}.{text_prefix(module)}"
        for adapter in getattr(module, "peft_config", {}):
            loaded |= lora_state(module, prefix, adapter)
    wrong = sorted(written.keys() ^ loaded.keys())
    dtype = fresh.dtype
    wrong += [k for k in written.keys() & loaded.keys() if not torch.equal(written[k].to(dtype), loaded[k].to(dtype))]
    if wrong or not written:
        raise ExportError(f"{len(wrong)} of {len(written)} tensors in {file.name} did not reload, such as {wrong[:3]}")
