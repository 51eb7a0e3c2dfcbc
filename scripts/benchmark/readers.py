"""How many tensors of a LoRA file the programs that read it take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from trainers.families import Family
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

Count = tuple[int, int]  # taken, and in the file


def count_taken(family: Family, folder: Path) -> dict[str, Count]:
    """By the readers' names; the models have no weights, so shapes and names alone are looked at.

    diffusers loads its file itself. For ComfyUI and sd-scripts it is their rule for names, told
    again here: `lora_unet_` and the names of SD1.5's layers with underscores, and for the others
    diffusers' own names.
    """
    family.load()
    denoiser = family.new_meta_model(family.denoiser_name)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    layers = [name for name, layer in denoiser.named_modules() if is_adaptable(layer)]
    path = folder / WEIGHT_NAME
    family.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
    (adapter,) = denoiser.peft_config
    loaded = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    taken = {"diffusers": count(path, [f"{family.denoiser_name}.{key}" for key in loaded])}
    if (folder / KOHYA_NAME).exists():
        stems = ["lora_unet_" + name.replace(".", "_") for name in layers]
        kinds = ("lora_down.weight", "lora_up.weight", "alpha")
        taken["sd-scripts, A1111, ComfyUI"] = count(folder / KOHYA_NAME, joined(stems, kinds))
    else:
        stems = [f"{family.denoiser_name}.{name}" for name in layers]
        taken["ComfyUI"] = count(path, joined(stems, ("lora_A.weight", "lora_B.weight")))
    return taken


def is_adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)


def joined(stems: Iterable[str], kinds: Iterable[str]) -> set[str]:
    return {f"{stem}.{kind}" for stem in stems for kind in kinds}


def count(path: Path, known: Iterable[str]) -> Count:
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    return len(keys & set(known)), len(keys)
