"""The file that leaves home: LoRA in diffusers' format with its scale folded in, and the proof that it reloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from .cache import CachedEncoder
from .families import FAMILIES, Family
from .sections import DreamBoothConfig

Encode = Callable[[str, str], dict[str, Tensor]]  # a text encoder's name and a prompt to its outputs
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the reloaded output, relative L2


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


def text_prefix(module: nn.Module) -> str:
    """transformers 5 dropped the level `text_model.` of CLIPTextModel, which ComfyUI and kohya's readers need."""
    return (
        "text_model." if isinstance(module, CLIPTextModel) and "text_model" not in dict(module.named_children()) else ""
    )


def save_lora(family: Family, text_encoders: Sequence[str], folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, aside first and then renamed."""
    layers = {}
    for name in (family.denoiser_name, *text_encoders):
        module = getattr(family.pipe, name)
        layers[f"{name}_lora_layers"] = lora_state(module, text_prefix(module))
        layers[f"{name}_lora_adapter_metadata"] = lora_metadata(module)
    with TemporaryDirectory(dir=folder) as aside:
        family.pipeline.save_lora_weights(aside, **layers)
        (Path(aside) / WEIGHT_NAME).replace(folder / WEIGHT_NAME)


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
    fresh = FAMILIES[model.family](model, encoder.family.device, dtype)
    fresh.load("vae", fresh.denoiser_name, *encoder.live)
    if config.lora:
        fresh.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
        check_keys(fresh, (fresh.denoiser_name, *encoder.train), folder / WEIGHT_NAME)
    fresh.compress()

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
    from safetensors.torch import load_file

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
