"""The proof that a written file, loaded into a fresh base, gives the trained output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load_file
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.efficiency.apply import open_family
from trainers.families import Family
from trainers.families.sampling import PromptEncoder
from trainers.lora.base_layers import name_prefix
from trainers.lora.export import lora_state
from trainers.lora.files import load_run_file, read_lora
from trainers.lora.lycoris import has_lycoris
from trainers.lora.update import max_relative_difference
from trainers.run_folder import KOHYA_NAME, PIPELINE, WEIGHT_NAME

# The allowed difference of the reloaded output, relative L2, by the precision of the base.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class ExportError(RuntimeError):
    """The written file is not what was trained: a fault of the toolkit, never of the user."""


@torch.no_grad()
def probe_denoiser(
    family: Family, resolution: int, text: dict[str, Tensor], denoise: Callable[..., Tensor]
) -> Tensor:
    """The output (1, C, h, w) of `denoise` on fixed noise, in the middle of the schedule.

    text: the encoders' outputs for one prompt, without the batch's dimension.
    """
    size = resolution // family.vae_scale_factor
    channels = family.vae_config["latent_channels"]
    # drawn on the CPU, since devices draw different numbers
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, channels, size, size, generator=generator).to(family.device)
    t = torch.full((1,), family.probe_time, device=family.device)
    text = {name: value[None].to(family.device) for name, value in text.items()}
    with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
        return denoise(x_t, t, text).float()


def verify_export(
    config: DreamBoothConfig, encoder: CachedEncoder, expected: Tensor, prompt: str
) -> tuple[Family, PromptEncoder, float]:
    """Load the exported file into a fresh base, and compare its output with `expected`.

    expected: what `probe_denoiser` gave at the end of the training. Returns the fresh family, how
    it encodes prompts, and the relative difference of the outputs. Raises: ExportError.
    """
    trained = encoder.family
    reloaded = reload_export(config, encoder)
    if config.writes_kohya:
        check_kohya(reloaded, config.output_dir)
    reloaded.apply_memory_options()
    # so that only the weights are compared, not how they are computed with
    reloaded.set_autocast(trained.needs_autocast)

    def encode(name: str, prompt: str) -> dict[str, Tensor]:
        # what did not train is in the cache, so that it need not be loaded again
        is_loaded = name in encoder.loaded_encoders
        encode_with = reloaded.encode_prompt if is_loaded else encoder.encoder_outputs
        return encode_with(name, prompt)

    text = {}
    for name in reloaded.text_encoder_names:
        text |= encode(name, prompt)
    denoise = partial(reloaded.denoise, reloaded.denoiser)
    output = probe_denoiser(reloaded, config.data.max_resolution, text, denoise)
    difference = ((output - expected).norm() / expected.norm()).item()
    # not "greater than", which NaN would pass
    if not difference <= TOLERANCE[trained.dtype]:
        raise ExportError(
            f"the reloaded weights compute a different output: relative difference {difference:.2e}"
        )
    return reloaded, encode, difference


def reload_export(config: DreamBoothConfig, encoder: CachedEncoder) -> Family:
    """A fresh base with the exported file, loaded by diffusers as any user would."""
    folder, model = config.output_dir, config.model
    if not config.lora:
        pipeline = {"pretrained_model_name_or_path": str(folder / PIPELINE), "variant": None}
        model = model.model_copy(update=pipeline)
    trained = encoder.family
    reloaded = open_family(model, trained.device, trained.dtype, trained.memory.shard)
    reloaded.load("vae", reloaded.denoiser_name, *encoder.loaded_encoders)
    if config.lora:
        load_run_file(reloaded, folder / WEIGHT_NAME)
        parts = (reloaded.denoiser_name, *encoder.trained_encoders)
        check_keys(reloaded, parts, folder / WEIGHT_NAME)
    return reloaded


def check_kohya(family: Family, folder: Path) -> None:
    """The kohya file must hold the updates of diffusers' file. Raises: ExportError."""
    files = (WEIGHT_NAME, KOHYA_NAME)
    diffusers, kohya = (read_lora(folder / name, family) for name in files)
    difference = max_relative_difference(diffusers, kohya)
    if not difference <= TOLERANCE[torch.float32]:
        raise ExportError(
            f"{KOHYA_NAME} contains other updates than {WEIGHT_NAME}: relative difference "
            f"{difference:.2e}"
        )


def check_keys(reloaded: Family, names: Sequence[str], file: Path) -> None:
    """Every tensor in the file must be found in its layer. Raises: ExportError."""
    written, loaded = load_file(file), {}
    if has_lycoris(written):
        check_lycoris(reloaded, names, file)
        return
    for name in names:
        module = getattr(reloaded.pipe, name)
        for adapter in getattr(module, "peft_config", {}):
            loaded |= lora_state(module, name_prefix(name, module), adapter)
    mismatched = sorted(written.keys() ^ loaded.keys())
    for key in written.keys() & loaded.keys():
        # the loaded tensors were rounded to the base's precision
        if not torch.equal(written[key].to(reloaded.dtype), loaded[key].to(reloaded.dtype)):
            mismatched.append(key)
    if mismatched or not written:
        raise ExportError(
            f"{len(mismatched)} of {len(written)} tensors in {file.name} were not loaded as they "
            f"were written, for example {mismatched[:3]}"
        )


def check_lycoris(reloaded: Family, names: Sequence[str], file: Path) -> None:
    """Each layer must add what the file says by the rules of ComfyUI. Raises: ExportError."""
    lora, wrong = read_lora(file, reloaded), []
    for component in names:
        module = getattr(reloaded.pipe, component)
        prefix = name_prefix(component, module)
        for name, layer in module.named_modules():
            if not isinstance(layer, LycorisLayer):
                continue
            update = lora.pop(prefix + name, None)
            delta = layer.get_delta_weight([*layer.scaling][-1]).flatten(1).cpu()
            # the same products in another order
            if update is None or not torch.allclose(delta, update.delta_weight(), 1e-4, 1e-6):
                wrong.append(prefix + name)
    if wrong or lora:
        raise ExportError(
            f"{file.name}: {len(wrong)} layers add something else than the file says, and "
            f"{len(lora)} are not there, for example {[*wrong, *lora][:3]}"
        )
