"""The file that leaves home: LoRA in diffusers' format with its scale folded in, and the proof that it reloads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .config import Config
from .families import FAMILIES, Condition, Family

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


def trained_modules(family: Family, with_text_encoders: bool) -> dict[str, nn.Module]:
    """The pipeline's modules that were trained, by name."""
    names = (family.denoiser_name, *(family.text_encoder_names if with_text_encoders else ()))
    return {name: getattr(family.pipe, name) for name in names}


def save_lora(family: Family, config: Config, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, aside first and then renamed."""
    layers = {}
    for name, module in trained_modules(family, config.train.train_text_encoder).items():
        # transformers 5 dropped the level `text_model.`, which ComfyUI and kohya's readers need
        prefix = "text_model." if name in family.text_encoder_names else ""
        layers[f"{name}_lora_layers"] = lora_state(module, prefix)
        layers[f"{name}_lora_adapter_metadata"] = lora_metadata(module)
    with TemporaryDirectory(dir=folder) as aside:
        family.pipeline.save_lora_weights(aside, **layers)
        (Path(aside) / WEIGHT_NAME).replace(folder / WEIGHT_NAME)


def save_pipeline(family: Family, folder: Path, with_text_encoders: bool) -> None:
    """The whole pipeline with the trained weights, in the diffusers layout."""
    trained = trained_modules(family, with_text_encoders)
    pipe = family.pipeline.from_pretrained(family.folder, variant=family.variant, **trained)
    pipe.save_pretrained(folder)


@torch.no_grad()
def probe(family: Family, condition: Condition, denoise: nn.Module) -> Tensor:
    """The output (1, C, h, w) of `denoise` on fixed noise, in the middle of the schedule, for one condition."""
    unet = family.denoiser.config
    size = unet.sample_size if isinstance(unet.sample_size, int) else unet.sample_size[0]
    x_t = torch.randn(1, unet.in_channels, size, size, generator=torch.Generator().manual_seed(0)).to(family.device)
    t = torch.full((1,), family.scheduler.config.num_train_timesteps // 2, device=family.device)
    condition = {name: value[None].to(family.device) for name, value in condition.items()}
    with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
        return denoise(x_t.to(family.dtype), t, condition).float()


def prove(
    config: Config, expected: Tensor, prompt: str, device: torch.device, dtype: torch.dtype
) -> tuple[Family, float]:
    """Load the exported file into a fresh base as any user would, and compare it with the training's last state.

    Returns the fresh family, ready to sample, and the relative difference of the outputs. Raises: ExportError.
    """
    folder, model = config.output_dir, config.model
    if not config.lora:
        model = model.model_copy(update={"pretrained_model_name_or_path": str(folder / "pipeline"), "variant": None})
    fresh = FAMILIES[model.family](model, device, dtype)
    fresh.load("vae", fresh.denoiser_name, *fresh.text_encoder_names)
    if config.lora:
        fresh.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
        check_keys(fresh, folder / WEIGHT_NAME)
    output = probe(fresh, fresh.encode_prompt(prompt), lambda x, t, c: fresh.predict(fresh.denoiser, x, t, c))
    difference = ((output - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE[dtype]:
        raise ExportError(f"the reloaded weights give another output: relative difference {difference:.2e}")
    return fresh, difference


def check_keys(fresh: Family, file: Path) -> None:
    """Every tensor in the file must have found its layer. Raises: ExportError."""
    from safetensors.torch import load_file

    written, loaded = load_file(file), {}
    for name in (fresh.denoiser_name, *fresh.text_encoder_names):
        module = getattr(fresh.pipe, name)
        prefix = f"{name}.text_model." if name in fresh.text_encoder_names else f"{name}."
        for adapter in getattr(module, "peft_config", {}):
            loaded |= lora_state(module, prefix, adapter)
    wrong = sorted(written.keys() ^ loaded.keys())
    dtype = fresh.dtype
    wrong += [k for k in written.keys() & loaded.keys() if not torch.equal(written[k].to(dtype), loaded[k].to(dtype))]
    if wrong or not written:
        raise ExportError(f"{len(wrong)} of {len(written)} tensors in {file.name} did not reload, such as {wrong[:3]}")
