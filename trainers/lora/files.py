"""LoRA files of any known format, checked against the base model and put on it."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.formats import detect_format
from trainers.lora.peft_format import to_peft
from trainers.lora.update import Lora


def read_lora(path: Path, family: Family) -> Lora:
    """The updates in a LoRA file or PEFT folder.

    It prints what of it belongs to no layer of the base. Raises: UserError when that is all of the
    denoiser's, or when the file is not plain LoRA.
    """
    found, unknown = detect_format(path).read(path, family)
    layers = adaptable_layers(family)
    lora = {}
    for name, update in found.items():
        if name in layers:
            lora[name] = update
        else:
            unknown.append(name)
    if not lora and not unknown:
        raise UserError(f"{path}: there is no LoRA in it. A run writes its LoRA when it finishes")
    has_denoiser = any(name.startswith(family.denoiser_name) for name in lora)
    if not lora or (unknown and not has_denoiser):
        num_layers = len(unknown) + len(lora)
        raise UserError(
            f"{path}: {len(unknown)} of {num_layers} layers are not in this base model, for "
            f"example {unknown[0]}. The file was trained for another model, or is not a LoRA"
        )
    if unknown:
        print(
            f"{path}: {len(lora)} layers were read; {len(unknown)} are not in this base model, "
            f"for example {unknown[0]}"
        )
    return lora


def load_lora(family: Family, file: Path) -> None:
    """Put a LoRA file or PEFT folder on the loaded pipeline.

    DoRA is possible only from a file of diffusers, which loads it itself.
    """
    family.pipe.load_lora_weights(file if has_dora(file) else to_peft(read_lora(file, family)))


def has_dora(file: Path) -> bool:
    """Whether a file has the magnitudes of DoRA."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as opened:
        return any("lora_magnitude_vector" in key for key in opened.keys())  # noqa: SIM118
