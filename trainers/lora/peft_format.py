"""PEFT's names of LoRA tensors, and its folders with a config and the tensors of one component."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import name_prefix
from trainers.lora.update import Lora, LoraUpdate

SUFFIX = ""
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MODEL_PREFIX = "base_model.model."  # before the names in PEFT's own files


def recognizes(path: Path) -> bool:
    return path.is_dir()


def read(path: Path, family: Family) -> tuple[Lora, list[str]]:
    """The updates in a folder that PEFT wrote, or in a folder with one such folder per component.

    A folder that is not called like a component of the pipeline is the denoiser's.
    """
    lora: Lora = {}
    for file in sorted(path.rglob(CONFIG_NAME)):
        folder = file.parent
        is_component = folder.name in family.components
        component = folder.name if is_component else family.denoiser_name
        prefix = name_prefix(component, family.meta_model(component))
        state = {}
        for key, value in load_file(folder / TENSORS_NAME).items():
            state[prefix + key.removeprefix(MODEL_PREFIX)] = value
        lora |= from_peft(state, {component: json.loads(file.read_text())})
    return lora, []


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
        PeftConfig(**peft_config(own)).save_pretrained(path / component)
        state = {MODEL_PREFIX + key: value for key, value in to_peft(own).items()}
        save_file(state, path / component / TENSORS_NAME, {"format": "pt"})


def from_peft(state: Mapping[str, Tensor], configs: Mapping[str, dict]) -> Lora:
    """The updates in tensors NAME.lora_A.weight and NAME.lora_B.weight.

    configs: PEFT's, by component; without one alpha is the rank. A tensor NAME.alpha, which some
    programs write for a layer, counts more than the config. Raises: UserError for what is not plain
    LoRA.
    """
    lora = {}
    for key, a in state.items():
        name, _, kind = key.partition(".lora_")
        if kind not in ("A.weight", "B.weight") and not key.endswith(".alpha"):
            raise UserError(f"{key}: only plain LoRA can be read, not LoHa, LoKr, OFT or DoRA")
        if kind == "A.weight":
            component, _, module = name.partition(".")
            config = configs.get(component) or {}
            rank = len(a)
            alpha = config.get("lora_alpha", rank)
            alpha = match_pattern(config.get("alpha_pattern"), module, alpha)
            alpha = state[f"{name}.alpha"].item() if f"{name}.alpha" in state else alpha
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            lora[name] = LoraUpdate(a.float(), state[f"{name}.lora_B.weight"].float() * scale)
    return lora


def match_pattern(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the value of the first key that, as a regex, is the name or its end."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def to_peft(lora: Lora) -> dict[str, Tensor]:
    """The tensors by PEFT's names; alpha is the rank.

    With names by component they are diffusers', with names by module those of a PEFT folder.
    """
    state = {}
    for name, update in lora.items():
        state[f"{name}.lora_A.weight"] = update.a.contiguous()
        state[f"{name}.lora_B.weight"] = update.b.contiguous()
    return state


def components(lora: Lora) -> dict[str, Lora]:
    """The updates of each component by the names of its modules."""
    found: dict[str, Lora] = {}
    for name, update in lora.items():
        component, _, module = name.partition(".")
        found.setdefault(component, {})[module] = update
    return found


def peft_config(lora: Lora) -> dict:
    """PEFT's config of one component's updates by module; alpha is the rank in each layer."""
    ranks = [update.rank for update in lora.values()]
    # layers of another rank than most are named one by one
    common_rank = max(set(ranks), key=ranks.count)
    special = {}
    for name, update in lora.items():
        if update.rank != common_rank:
            special[re.escape(name)] = update.rank
    return {
        "r": common_rank,
        "lora_alpha": common_rank,
        "rank_pattern": special,
        "alpha_pattern": special,
        "target_modules": sorted(lora),
    }
