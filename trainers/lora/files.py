"""LoRA files of diffusers, PEFT and kohya's kind: read, written, applied to a base, merged into
it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.kohya import from_kohya, to_kohya
from trainers.lora.low_rank import lora_from_difference
from trainers.lora.peft_format import diffusers_metadata, from_peft, peft_config, to_peft
from trainers.lora.update import Layers, Lora

METADATA_KEY = "lora_adapter_metadata"  # diffusers'


def text_prefix(module: nn.Module) -> str:
    """transformers 5 dropped the level `text_model.` of CLIPTextModel, which ComfyUI and kohya's
    readers need."""
    return (
        "text_model."
        if isinstance(module, CLIPTextModel) and "text_model" not in dict(module.named_children())
        else ""
    )


def adaptable_layers(family: Family) -> Layers:
    """Every layer of the base that LoRA can be on, by component and module, and its outputs."""
    parts = {
        part: family.meta_model(part) for part in (family.denoiser_name, *family.clip_encoders)
    }
    return {name: len(weight) for name, weight in adaptable_weights(parts).items()}


def read_metadata_header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def write_diffusers(lora: Lora, file: Path, facts: dict[str, str]) -> None:
    save_file(to_peft(lora), file, facts | {"format": "pt", METADATA_KEY: diffusers_metadata(lora)})


def write_kohya(lora: Lora, family: Family, file: Path, facts: dict[str, str]) -> None:
    """With the ss_ and sshs_ keys by which sd-scripts, A1111 and its extensions know a file."""
    kohya = family.facts.kohya
    state = to_kohya(lora, adaptable_layers(family), kohya)
    ranks = {update.rank for update in lora.values()}
    metadata = {
        "ss_v2": "False",
        "ss_base_model_version": kohya.base_model_version,
        "ss_network_module": kohya.network_module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_args": "{}",
    }
    metadata["ss_network_alpha"] = metadata["ss_network_dim"]
    content = save(state, metadata)
    start = 8 + int.from_bytes(content[:8], "little")  # of the tensors
    metadata["sshs_model_hash"] = hashlib.sha256(content[start:]).hexdigest()
    metadata["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    save_file(state, file, facts | metadata)


def write_peft(lora: Lora, family: Family, folder: Path) -> None:
    """A folder for each component, for `PeftModel.from_pretrained(component, FOLDER)`."""
    for part in dict.fromkeys(name.partition(".")[0] for name in lora):
        prefix = f"{part}.{text_prefix(family.meta_model(part))}"
        own = {
            name.removeprefix(prefix): update
            for name, update in lora.items()
            if name.startswith(prefix)
        }
        PeftConfig(**peft_config(own)).save_pretrained(folder / part)
        state = {f"base_model.model.{key}": value for key, value in to_peft(own).items()}
        save_file(state, folder / part / "adapter_model.safetensors", {"format": "pt"})


def read_lora(path: Path, family: Family) -> Lora:
    """A LoRA file of diffusers or kohya's kind, or a PEFT folder; tells what of it no layer of the
    base answers to.

    Raises: UserError when that is all of its denoiser, or when it is not plain LoRA.
    """
    layers = adaptable_layers(family)
    if path.is_dir():
        lora = {}
        for file in sorted(path.rglob("adapter_config.json")):
            part = (
                file.parent.name if file.parent.name in family.components else family.denoiser_name
            )
            prefix = f"{part}.{text_prefix(family.meta_model(part))}"
            state = load_file(file.parent / "adapter_model.safetensors")
            state = {
                prefix + key.removeprefix("base_model.model."): value
                for key, value in state.items()
            }
            lora |= from_peft(state, {part: json.loads(file.read_text())})
        unknown = []
    else:
        state = load_file(path)
        if any(key.startswith(("lora_unet_", "lora_te")) for key in state):
            lora, unknown = from_kohya(state, layers, family.facts.kohya)
        else:
            flat, configs = json.loads(read_metadata_header(path).get(METADATA_KEY, "{}")), {}
            for key, value in flat.items():
                part, _, key = key.partition(".")
                configs.setdefault(part, {})[key] = value
            lora, unknown = from_peft(add_text_level(state, family), configs), []
    unknown += [name for name in lora if name not in layers]
    lora = {name: update for name, update in lora.items() if name in layers}
    if not lora and not unknown:
        raise UserError(
            f"{path}: no LoRA is in it. Of a run that has not finished there is none yet"
        )
    if not lora or (unknown and not any(name.startswith(family.denoiser_name) for name in lora)):
        raise UserError(
            f"{path}: of {len(unknown) + len(lora)} layers {len(unknown)} are not in this base, "
            f"such as "
            f"{unknown[:1]}. It was made for another model, or is no LoRA"
        )
    if unknown:
        print(
            f"{path}: {len(lora)} layers read; {len(unknown)} are not in this base, such as "
            f"{unknown[0]}"
        )
    return lora


def add_text_level(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Files that diffusers writes with transformers 5 lack the level `text_model.`."""
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        lacks_level = part in family.clip_encoders and not rest.startswith("text_model.")
        renamed[f"{part}.text_model.{rest}" if lacks_level else key] = value
    return renamed


def load_lora(family: Family, file: Path) -> None:
    """Put what `read_lora` reads on the loaded pipeline; DoRA only from a file of diffusers'
    kind."""
    dora = file.is_file() and any("lora_magnitude_vector" in key for key in load_file(file))
    family.pipe.load_lora_weights(file if dora else to_peft(read_lora(file, family)))


def loaded_weights(family: Family) -> dict[str, nn.Parameter]:
    return adaptable_weights(
        {part: getattr(family.pipe, part) for part in (family.denoiser_name, *family.clip_encoders)}
    )


def adaptable_weights(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Those that LoRA can change, by component and module."""
    weights = {}
    for part, module in parts.items():
        prefix = f"{part}.{text_prefix(module)}"
        linear = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        weights |= {prefix + name: layer.weight for name, layer in linear.items()}
    return weights


@torch.no_grad()
def merge_lora(family: Family, lora: Lora) -> float:
    """Add the updates to the loaded weights; what rounding to their precision loses, relative to
    the updates."""
    weights, lost, total = loaded_weights(family), 0.0, 0.0
    for name, update in lora.items():
        weight, product = weights[name], update.delta_weight().view_as(weights[name])
        exact = weight.double() + product
        weight.copy_(exact)
        lost += (weight - exact).square().sum().item()
        total += product.double().square().sum().item()
    return (lost / total) ** 0.5


def extract_lora(base: Family, tuned: Family, rank: int) -> tuple[Lora, float]:
    """What training added to the base, at `rank`; and the share that this leaves out."""
    for family in (base, tuned):
        family.load(family.denoiser_name, *family.clip_encoders)
    return lora_from_difference(loaded_weights(base), loaded_weights(tuned), rank)


def max_relative_difference(a: Lora, b: Lora) -> float:
    """The largest relative difference (Frobenius) of a layer's updates; infinite where one has
    none."""
    if a.keys() != b.keys():
        return float("inf")
    pairs = [(a[name].delta_weight(), b[name].delta_weight()) for name in a]
    return max(float((x - y).norm() / x.norm().clamp_min(1e-30)) for x, y in pairs)
