"""PEFT's names of LoRA tensors, and its folders with a config and the tensors of one component."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig as PeftConfig
from torch import Tensor

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers, name_prefix
from trainers.lora.lycoris import LycorisUpdate
from trainers.lora.lycoris_files import make_peft_config
from trainers.lora.names import component_layers
from trainers.lora.peft_config import PeftScale, make_config, parse_json_object, parse_scale
from trainers.lora.update import Lora, LoraUpdate, Rows, is_lycoris
from trainers.tensor_file import write_tensors

SUFFIX = ""
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MODEL_PREFIX = "base_model.model."  # before the names in PEFT's own files


def layer_names(family: Family) -> dict[str, Rows]:
    """The names of the denoiser's layers in PEFT's files, which do not name the component."""
    return component_names(family, family.denoiser_name)


def component_names(family: Family, component: str) -> dict[str, Rows]:
    """The names of a component's layers in the file of a folder that is called like it."""
    prefix = name_prefix(component, family.meta_model(component))
    names = {}
    for layer in component_layers(adaptable_layers(family), component):
        own = f"{component}.{layer}".removeprefix(prefix)
        rows = Rows((f"{component}.{layer}",))
        # some programs leave the prefix out; CLIP's names may have the level `text_model.`
        for name in (own, layer):
            names |= {name: rows, MODEL_PREFIX + name: rows}
    return names


def find_adapters(path: Path, family: Family) -> dict[str, Path]:
    """The folder of each component, in a folder that PEFT wrote or that has such folders in it.

    A folder that is not called like a component of the pipeline is the denoiser's. Raises:
    UserError where two are for one component.
    """
    folders: dict[str, Path] = {}
    for file in sorted(path.rglob(CONFIG_NAME)):
        name = file.parent.name
        component = name if name in family.components else family.denoiser_name
        if component in folders:
            raise UserError(
                f"{path} has two adapters for {component}, in {folders[component]} and in "
                f"{file.parent}: name one of the two"
            )
        folders[component] = file.parent
    return folders


def read_scale(config: Path) -> PeftScale:
    """The scales in an adapter_config.json. Raises: UserError."""
    return parse_scale(read_config(config), str(config))


def read_config(config: Path) -> dict[str, object]:
    """An adapter_config.json. Raises: UserError."""
    try:
        text = config.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config} cannot be read ({error}). It has the alpha of the tensors beside it, "
            "without which their strength is not known"
        ) from error
    return parse_json_object(text, str(config))


def write(lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
    """A folder per component, for `PeftModel.from_pretrained(component, FOLDER)`.

    PEFT's files have no place for our metadata.
    """
    for component in components(lora):
        prefix = name_prefix(component, family.meta_model(component))
        own = {}
        for name, update in lora.items():
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = update
        plain = None if is_lycoris(own) else PeftConfig(**make_config(own))
        config = plain or make_peft_config(own, path)
        config.save_pretrained(path / component)
        state = {MODEL_PREFIX + key: value for key, value in to_peft(own).items()}
        write_tensors(state, path / component / TENSORS_NAME, {"format": "pt"})


def from_peft(state: Mapping[str, Tensor]) -> Lora:
    """The updates in tensors of a file that we wrote, where alpha is the rank."""
    lora = {}
    for key, a in state.items():
        name, _, kind = key.partition(".lora_A.")
        if kind:
            magnitude = state.get(f"{name}.lora_magnitude_vector")
            if magnitude is not None:
                magnitude = magnitude.flatten()
            lora[name] = LoraUpdate(a, state[f"{name}.lora_B.weight"], magnitude)
    return lora


def to_peft(lora: Lora) -> dict[str, Tensor]:
    """The tensors by PEFT's names; alpha is the rank.

    With names by component they are diffusers', with names by module those of a PEFT folder.
    """
    state = {}
    for name, update in lora.items():
        if isinstance(update, LycorisUpdate):
            state |= {f"{name}.{key}": tensor for key, tensor in update.tensors.items()}
            continue
        state[f"{name}.lora_A.weight"] = update.a.contiguous()
        state[f"{name}.lora_B.weight"] = update.b.contiguous()
        if update.magnitude is not None:
            # that of a convolution has the shape of its outputs
            shape = (1, -1, *[1] * (update.a.ndim - 2)) if update.a.ndim > 2 else (-1,)
            state[f"{name}.lora_magnitude_vector"] = update.magnitude.reshape(shape).contiguous()
    return state


def components(lora: Lora) -> dict[str, Lora]:
    """The updates of each component by the names of its modules."""
    found: dict[str, Lora] = {}
    for name, update in lora.items():
        component, _, module = name.partition(".")
        found.setdefault(component, {})[module] = update
    return found
