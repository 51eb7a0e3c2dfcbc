"""LoRA layers through PEFT (Hu et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainers.config import LoraConfig
from trainers.config.family_facts import FamilyFacts
from trainers.config.layer_patterns import fullmatch
from trainers.errors import UserError
from trainers.families import Family
from trainers.lora import lycoris_layers
from trainers.lora.lora_linear import LoraLinear
from trainers.lora.started import STARTS, StartedLinear, start_from_base

PEFT_INIT = {"gaussian": "gaussian", "kaiming": True, "orthogonal": "orthogonal"}

PRESETS = ("attention", "attention+mlp", "attention+mlp+conv")
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(family: Family, config: LoraConfig, text_encoders: Sequence[str]) -> None:
    """Freeze what the family has loaded, and put LoRA into its denoiser and these encoders."""
    add_adapter(family.denoiser, config, family.facts)
    own = {"target_modules": TEXT_ENCODER_LAYERS, "blocks": None}
    own |= {"rank_pattern": {}, "alpha_pattern": {}}
    for name in text_encoders:
        add_adapter(getattr(family.pipe, name), config.model_copy(update=own))
    adapted = [layer for layer in family.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    family.set_autocast(not all(isinstance(layer, LoraLinear) for layer in adapted))


def add_adapter(module: nn.Module, config: LoraConfig, facts: FamilyFacts | None = None) -> None:
    """Put LoRA layers into `module` and freeze the rest.

    They are float32 whatever the base's precision: in bfloat16 an Adam step would often round a
    weight back to where it was. facts: of the family whose denoiser the module is, for presets.
    """
    layers, start = target_layers(module, config, facts), config.init_lora_weights
    ranks = values_by_layer(layers, config.rank_pattern, "rank_pattern")
    # without an alpha that of a layer is its own rank
    alphas = {} if config.alpha else dict(ranks)
    alphas |= values_by_layer(layers, config.alpha_pattern, "alpha_pattern")
    shared = {
        "r": config.rank,
        "rank_pattern": join_patterns(ranks),
        "alpha_pattern": join_patterns(alphas),
        "target_modules": layers,
    }
    is_lora = config.type == "lora"
    make_config = make_lora_config if is_lora else lycoris_layers.make_config
    module.add_adapter(make_config(config, shared))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not is_lora:
        lycoris_layers.start_layers(module)
    elif start in STARTS:
        start_from_base(module, start)


def make_lora_config(config: LoraConfig, shared: Mapping[str, object]) -> PeftConfig:
    """PEFT's config of LoRA or DoRA; shared: ranks and layers."""
    start = config.init_lora_weights
    peft_config = PeftConfig(
        lora_alpha=config.alpha or config.rank,
        **shared,
        lora_dropout=config.dropout,
        # a start with a part of the base is made afterwards
        init_lora_weights=PEFT_INIT.get(start, True),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    if not (config.dropout or config.use_dora):
        linear = StartedLinear if start in STARTS else LoraLinear
        peft_config._register_custom_module({nn.Linear: linear})
    return peft_config


def target_layers(module: nn.Module, config: LoraConfig, facts: FamilyFacts | None) -> list[str]:
    """Full names of the linear and convolution layers that get LoRA.

    Raises: UserError when a part of what is asked for matches nothing, with names that are like it.
    """
    layers = [
        name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    requested, blocks = config.target_modules, config.blocks
    if requested == "all-linear":
        matched = [name for name in layers if isinstance(module.get_submodule(name), nn.Linear)]
    elif isinstance(requested, str) and facts and requested in PRESETS:
        parts = requested.removesuffix("+conv").split("+")
        endings = [ending for part in parts for ending in facts.lora_targets[part]]
        matched = [name for name in layers if facts.is_in_block(name) and ends_with(name, endings)]
        if requested.endswith("+conv"):
            matched += convolutions(module, facts)
    elif isinstance(requested, str):
        matched = [name for name in layers if fullmatch(requested, name)]
    else:
        for ending in requested:
            if not any(ends_with(name, [ending]) for name in layers):
                raise UserError(
                    f"lora.target_modules: no layer ends in {ending!r}. "
                    f"{suggest_layers(ending, layers)}"
                )
        matched = [name for name in layers if ends_with(name, requested)]
    if not matched:
        raise UserError(
            f"lora.target_modules: {requested!r} matches no layer. "
            f"{suggest_layers(str(requested), layers)}"
        )
    for block in blocks or ():
        if not any(name.startswith(f"{block}.") for name in matched):
            raise UserError(
                f"lora.blocks: none of the {len(matched)} layers is in {block!r}. "
                f"{suggest_layers(block, matched)}"
            )
    return [
        name
        for name in matched
        if blocks is None or name.startswith(tuple(f"{block}." for block in blocks))
    ]


def convolutions(module: nn.Module, facts: FamilyFacts) -> list[str]:
    """The full names of the convolutions in a U-Net's blocks, residual ones and samplers too."""
    blocks = tuple({f"{block.partition('.')[0]}." for block in facts.blocks})
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and name.startswith(blocks)
    ]


def values_by_layer(
    layers: Sequence[str], patterns: Mapping[str, float], key: str
) -> dict[str, float]:
    """The value of each layer that a pattern names, by PEFT's rule: of several the first counts.

    Raises: UserError for a pattern that decides about no layer, with names that are like it.
    """
    values: dict[str, float] = {}
    for pattern, value in patterns.items():
        named = [name for name in layers if fullmatch(rf"(.*\.)?({pattern})", name)]
        if not named:
            raise UserError(
                f"lora.{key}: {pattern!r} names none of the {len(layers)} layers with LoRA. "
                f"{suggest_layers(pattern, layers)}"
            )
        fresh = [name for name in named if name not in values]
        if not fresh:
            raise UserError(
                f"lora.{key}: other patterns before {pattern!r} decide about each of the "
                f"{len(named)} layers that it names: write it before them, or remove it"
            )
        values |= dict.fromkeys(fresh, value)
    return values


def join_patterns(values: Mapping[str, float]) -> dict[str, float]:
    """The values of layers as one pattern for each value, since PEFT tries all on each layer."""
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {f"^({'|'.join(own)})": value for value, own in names.items()}


@torch.no_grad()
def predict_base(module: nn.Module, inputs: Sequence[Tensor | dict[str, Tensor]]) -> Tensor:
    """What a module with LoRA computes while all its LoRA is off, without a graph for gradients."""
    adapted = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    parameters = chain.from_iterable(layer.parameters() for layer in adapted)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        return module(*inputs)
    finally:
        for layer in adapted:
            layer.enable_adapters(True)
        # PEFT lets all that it turns on train
        for parameter in frozen:
            parameter.requires_grad_(False)


def ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def suggest_layers(requested: str, layers: Sequence[str]) -> str:
    """'Names that exist: to_q (32), ...': the most alike parts of names, with how many layers have
    them."""
    counts: dict[str, int] = {}
    for name in layers:
        parts = name.split(".")
        for i in range(len(parts)):
            for part in (".".join(parts[i:]), ".".join(parts[: i + 1])):
                counts[part] = counts.get(part, 0) + 1
    close = (
        get_close_matches(requested, counts, 6, 0.5)
        or sorted({name.rpartition(".")[2] for name in layers})[:12]
    )
    return f"Names that exist: {', '.join(f'{name} ({counts[name]})' for name in close)}"
