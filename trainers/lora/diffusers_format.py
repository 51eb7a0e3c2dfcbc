"""The LoRA files of diffusers: PEFT's tensors of all components, and its configs in the header."""

from __future__ import annotations

import json
from pathlib import Path

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers, text_prefix
from trainers.lora.lycoris import LOHA
from trainers.lora.peft_config import PeftScale, make_config, parse_json_object, parse_scale
from trainers.lora.peft_format import components, to_peft
from trainers.lora.update import Lora, Rows, is_lycoris
from trainers.original.layout import TEXT_LEVEL
from trainers.tensor_file import TensorFile, write_tensors

SUFFIX = ".safetensors"
METADATA_KEY = "lora_adapter_metadata"  # the name of PEFT's configs in diffusers' headers


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in such files."""
    names = {}
    for layer in adaptable_layers(family):
        rows = Rows((layer,))
        component, _, rest = layer.partition(".")
        names[layer] = rows
        if component == family.denoiser_name:
            # files of the denoiser alone may leave its name out
            names[rest] = rows
        else:
            # transformers 5 leaves this level out of CLIP's names
            names[f"{component}.{rest.removeprefix(TEXT_LEVEL)}"] = rows
    return names


def write(lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
    header = metadata | {"format": "pt"}
    if not is_lycoris(lora):
        header[METADATA_KEY] = adapter_metadata(lora, family)
    elif next(iter(lora.values())).kind == LOHA:
        raise UserError(
            "diffusers reads no LoHa: write it with --format peft, kohya or merged, or with --rank "
            "N as the nearest plain LoRA"
        )
    write_tensors(to_peft(lora), path, header)


def adapter_metadata(lora: Lora, family: Family) -> str:
    """What diffusers keeps of PEFT's configs in a file's header, with the modules' own names."""
    flat = {}
    for component, updates in components(lora).items():
        level = text_prefix(family.meta_model(component))
        own = {name.removeprefix(level): update for name, update in updates.items()}
        for key, value in make_config(own).items():
            flat[f"{component}.{key}"] = value
    return json.dumps(flat, indent=2, sort_keys=True)


def read_scales(file: TensorFile) -> dict[str, PeftScale]:
    """The scales of each component in a file's header. Raises: UserError."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    where = f"{file.path}: {METADATA_KEY} in the header"
    configs: dict[str, dict] = {}
    for key, value in parse_json_object(text, where).items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    return {name: parse_scale(config, where) for name, config in configs.items()}
