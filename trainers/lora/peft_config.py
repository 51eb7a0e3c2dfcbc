"""PEFT's config of an adapter: what of it decides the strength of each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainers.errors import UserError
from trainers.lora.update import Lora, is_dora

# Initializations that also changed the base under the adapter, so that it fits no other.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")

# What PEFT would load beside the two tensors of a layer, and we would not.
UNSUPPORTED = (
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "megatron_config",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "arrow_config",
)

MAX_PATTERN = 300  # characters


@dataclass(frozen=True)
class PeftScale:
    """The scale of each layer of one component."""

    alpha: float | None = None  # None: the rank
    # endings of layers' names (or, after ^, whole names): the alpha of these layers
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, module: str, rank: int, alpha: float | None = None) -> float:
        """What B A is multiplied by. alpha: that of the layer alone, which counts more."""
        if alpha is None:
            alpha = self.layer_alpha(module)
        if alpha is None:
            alpha = rank
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def layer_alpha(self, module: str) -> float | None:
        """PEFT's rule: the first key that is the name or its end."""
        for name, alpha in self.alphas.items():
            whole = name.removeprefix("^")
            if module == whole or (name == whole and module.endswith(f".{whole}")):
                return alpha
        return self.alpha


def parse_scale(config: Mapping[str, object], where: str) -> PeftScale:
    """What a config from a file says of scales.

    where: the file, for messages. Raises: UserError for a config that is not of LoRA or DoRA, or
    has other values than PEFT writes.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{where}: its peft_type is {kind!r}; only LORA can be read")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGED_BASES):
        raise UserError(
            f"{where}: init_lora_weights is {start!r}, which changes the base as well. Convert the "
            "adapter with PEFT to a LoRA for the plain base"
        )
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    if unsupported:
        raise UserError(
            f"{where}: {', '.join(unsupported)} cannot be read, only plain LoRA or DoRA"
        )
    alpha = config.get("lora_alpha")
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise UserError(f"{where}: use_rslora is {rslora!r}, not true or false")
    if alpha is not None:
        alpha = check_number(alpha, "lora_alpha", where)
    return PeftScale(alpha, parse_pattern(config.get("alpha_pattern"), where), rslora)


def parse_pattern(pattern: object, where: str) -> dict[str, float]:
    """alpha_pattern, whose keys PEFT takes as regular expressions, with literal names for keys.

    A regular expression from a file is not run: it could take for ever.
    """
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        raise UserError(f"{where}: alpha_pattern is not a table of names and numbers")
    alphas = {}
    for key, value in pattern.items():
        name = re.sub(r"\\([.\-])", r"\1", key).removesuffix("$")
        if len(key) > MAX_PATTERN or not re.fullmatch(r"\^?[\w.\-]+", name):
            raise UserError(
                f"{where}: alpha_pattern has the key {key[:60]!r}. Only names of layers can be "
                "read, not regular expressions"
            )
        alphas[name] = check_number(value, f"alpha_pattern of {key[:60]!r}", where)
    return alphas


def check_number(value: object, name: str, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e6 or not math.isfinite(value):
        raise UserError(f"{where}: {name} is {str(value)[:60]}, not a number of usual size")
    return float(value)


def parse_json_object(text: str, where: str) -> dict[str, object]:
    """Raises: UserError for what is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def make_config(lora: Lora) -> dict[str, object]:
    """PEFT's config of one component's updates by module; alpha is the rank in each layer."""
    ranks = {name: update.rank for name, update in lora.items()}
    return rank_settings(ranks) | {"target_modules": sorted(lora), "use_dora": is_dora(lora)}


def rank_settings(ranks: Mapping[str, int]) -> dict[str, object]:
    """What PEFT's config says of the layers' ranks, which are their alphas too."""
    values = list(ranks.values())
    # layers of another rank than most are named one by one
    common_rank = max(set(values), key=values.count)
    special = {}
    for name, rank in ranks.items():
        if rank != common_rank:
            # without ^ it would also be every layer whose name ends like that
            special["^" + re.escape(name)] = rank
    return {
        "r": common_rank,
        "lora_alpha": common_rank,
        "rank_pattern": special,
        "alpha_pattern": special,
    }
