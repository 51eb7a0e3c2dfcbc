"""The proof that a written file, loaded into a fresh base, gives the trained output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.efficiency.apply import open_family
from trainers.families import Family
from trainers.lora.export import lora_state
from trainers.lora.files import max_relative_difference, read_lora, text_prefix
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

# a text encoder's name and a prompt to its outputs
PromptEncoder = Callable[[str, str], dict[str, Tensor]]
# of the reloaded output, relative L2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class ExportError(RuntimeError):
    """The written file is not what was trained: a fault of the toolkit, never of the user."""


@torch.no_grad()
def probe_denoiser(
    family: Family, resolution: int, text: dict[str, Tensor], denoise: Callable[..., Tensor]
) -> Tensor:
    """The output (1, C, h, w) of `denoise` on fixed noise, in the middle of the schedule, for one
    prompt's `text`."""
    size, channels = resolution // family.vae_scale_factor, family.vae_config["latent_channels"]
    x_t = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        family.device
    )
    t = torch.full((1,), family.probe_time, device=family.device)
    text = {name: value[None].to(family.device) for name, value in text.items()}
    with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
        return denoise(x_t, t, text).float()


def verify_export(
    config: DreamBoothConfig, encoder: CachedEncoder, expected: Tensor, prompt: str
) -> tuple[Family, PromptEncoder, float]:
    """Load the exported file into a fresh base as any user would, and compare it with the
    training's last state.

    Returns the fresh family, how it encodes prompts, and the relative difference of the outputs.
    Raises: ExportError.
    """
    folder, model, dtype = config.output_dir, config.model, encoder.family.dtype
    shard = encoder.family.memory.shard
    if not config.lora:
        model = model.model_copy(
            update={"pretrained_model_name_or_path": str(folder / "pipeline"), "variant": None}
        )
    reloaded = open_family(model, encoder.family.device, dtype, shard)
    reloaded.load("vae", reloaded.denoiser_name, *encoder.loaded_encoders)
    if config.lora:
        reloaded.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
        check_keys(
            reloaded, (reloaded.denoiser_name, *encoder.trained_encoders), folder / WEIGHT_NAME
        )
    if config.writes_kohya:
        compare_kohya(reloaded, folder)
    reloaded.apply_memory_options()
    # so that only the weights are compared, not how they are computed with
    reloaded.set_autocast(encoder.family.needs_autocast)

    def encode(name: str, prompt: str) -> dict[str, Tensor]:
        if name in encoder.loaded_encoders:
            return reloaded.encode_prompt(name, prompt)
        return encoder.encoder_outputs(name, prompt)

    text = {}
    for name in reloaded.text_encoder_names:
        text |= encode(name, prompt)
    output = probe_denoiser(
        reloaded, config.data.resolution, text, partial(reloaded.denoise, reloaded.denoiser)
    )
    difference = ((output - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE[dtype]:
        raise ExportError(
            f"the reloaded weights give another output: relative difference {difference:.2e}"
        )
    return reloaded, encode, difference


def compare_kohya(family: Family, folder: Path) -> None:
    """Raises: ExportError when kohya's file holds other updates than the one beside it."""
    written, kohya = (read_lora(folder / name, family) for name in (WEIGHT_NAME, KOHYA_NAME))
    difference = max_relative_difference(written, kohya)
    if not difference <= TOLERANCE[torch.float32]:
        raise ExportError(
            f"{KOHYA_NAME} reads back as other updates: relative difference {difference:.2e}"
        )


def check_keys(reloaded: Family, names: Sequence[str], file: Path) -> None:
    """Every tensor in the file must have found its layer. Raises: ExportError."""
    written, loaded = load_file(file), {}
    for name in names:
        module = getattr(reloaded.pipe, name)
        prefix = f"{name}.{text_prefix(module)}"
        for adapter in getattr(module, "peft_config", {}):
            loaded |= lora_state(module, prefix, adapter)
    mismatched = sorted(written.keys() ^ loaded.keys())
    dtype = reloaded.dtype
    mismatched += [
        k
        for k in written.keys() & loaded.keys()
        if not torch.equal(written[k].to(dtype), loaded[k].to(dtype))
    ]
    if mismatched or not written:
        raise ExportError(
            f"{len(mismatched)} of {len(written)} tensors in {file.name} did not reload, such as "
            f"{mismatched[:3]}"
        )
