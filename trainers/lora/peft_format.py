"""PEFT's and diffusers' names"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from trainers.errors import UserError
from trainers.lora.update import Lora, LoraUpdate


def from_peft(state: Mapping[str, Tensor], configs: Mapping[str, dict]) -> Lora:
    """Tensors NAME.lora_A.weight and NAME.lora_B.weight; configs: PEFT's, by component; without one
    alpha = rank.

    An own alpha of a layer, NAME.alpha, goes before. Raises: UserError for what is not plain LoRA.
    """
    lora = {}
    for key, a in state.items():
        name, _, kind = key.partition(".lora_")
        if kind not in ("A.weight", "B.weight") and not key.endswith(".alpha"):
            raise UserError(f"{key}: only plain LoRA can be read, not its relatives")
        if kind == "A.weight":
            component, _, module = name.partition(".")
            rank, config = len(a), configs.get(component) or {}
            alpha = match_pattern(
                config.get("alpha_pattern"), module, config.get("lora_alpha", rank)
            )
            alpha = state[f"{name}.alpha"].item() if f"{name}.alpha" in state else alpha
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            lora[name] = LoraUpdate(a.float(), state[f"{name}.lora_B.weight"].float() * scale)
    return lora


def match_pattern(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regex, is the name or its end."""
    matches = (
        value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)
    )
    return next(matches, default)


def to_peft(lora: Lora) -> dict[str, Tensor]:
    """Diffusers' tensors, or with the component cut off those of a PEFT folder; alpha is the
    rank."""
    state = {}
    for name, update in lora.items():
        state[f"{name}.lora_A.weight"] = update.a.contiguous()
        state[f"{name}.lora_B.weight"] = update.b.contiguous()
    return state


def peft_config(lora: Lora) -> dict:
    """Of one component's updates by module name: alpha is the rank in each layer."""
    ranks = [update.rank for update in lora.values()]
    common_rank = max(set(ranks), key=ranks.count)
    special = {
        re.escape(name): update.rank for name, update in lora.items() if update.rank != common_rank
    }
    return {
        "r": common_rank,
        "lora_alpha": common_rank,
        "rank_pattern": special,
        "alpha_pattern": special,
    } | {"target_modules": sorted(lora)}


def diffusers_metadata(lora: Lora) -> str:
    """What diffusers keeps of PEFT's configs in a file's header."""
    flat = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in lora):
        own = {
            name.removeprefix(f"{component}."): u
            for name, u in lora.items()
            if name.startswith(f"{component}.")
        }
        flat |= {f"{component}.{key}": value for key, value in peft_config(own).items()}
    return json.dumps(flat, indent=2, sort_keys=True)
