"""Rules between the keys of any trainer's config, as (path, message) of each that is broken."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from trainers.config.base_sections import (
    FINDS_RATE,
    OPTIMIZER_KEYS,
    PRODIGY_RATE,
    SCHEDULE_FREE,
    HubConfig,
    OptimizerConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from trainers.config.base import Config

Errors = Iterator[tuple[str, str]]
AnyConfig = TypeVar("AnyConfig", bound="Config")

# The part of a short run that a longer run's warm-up is reduced to.
WARMUP_SHARE = 0.1


class SpecialKeys(NamedTuple):
    """Keys of a section that have an effect with some choices only."""

    choices: Sequence[str]
    section: str
    keys: Sequence[str]


# of packages that are not called like their module
PIP_NAMES = {"prodigyplus": "prodigy-plus-schedule-free"}
KEYS_BY_SCHEDULE = [
    SpecialKeys(["cosine_with_restarts"], "optimizer", ["lr_num_cycles"]),
    SpecialKeys(["polynomial"], "optimizer", ["lr_power"]),
]


def optimizer_errors(config: Config) -> Errors:
    """Settings that the optimizer or the schedule does not take, and rates that teach nothing."""
    optimizer = config.optimizer
    by_key: dict[str, list[str]] = {}
    for name, keys in OPTIMIZER_KEYS.items():
        for key in keys:
            by_key.setdefault(key, []).append(name)
    by_optimizer = [SpecialKeys(names, "optimizer", [key]) for key, names in by_key.items()]
    yield from irrelevant_keys(config, optimizer.name, by_optimizer)
    yield from irrelevant_keys(config, optimizer.lr_scheduler, KEYS_BY_SCHEDULE)
    if optimizer.lr_scheduler == "constant" and optimizer.lr_warmup_steps:
        message = "'constant' has no warm-up: use lr_scheduler: constant_with_warmup"
        yield "optimizer.lr_warmup_steps", message
    yield from argument_errors(optimizer)
    if optimizer.name in SCHEDULE_FREE:
        yield from schedule_free_errors(config)
    if optimizer.name in FINDS_RATE:
        yield from prodigy_errors(optimizer)


def argument_errors(optimizer: OptimizerConfig) -> Errors:
    """Arguments that are keys of the section, and a package that is not there."""
    own = {"lr": "learning_rate", **{key: key for key in OPTIMIZER_KEYS.get(optimizer.name, ())}}
    for key, ours in own.items():
        if key in optimizer.arguments:
            yield "optimizer.arguments", f"{key} has a key of its own: set optimizer.{ours}"
    package = optimizer.name.partition(".")[0]
    if optimizer.name not in OPTIMIZER_KEYS and importlib.util.find_spec(package) is None:
        yield "optimizer.name", f"there is no package {package} here: pip install {package}"


def schedule_free_errors(config: Config) -> Errors:
    """What an optimizer replaces that averages its weights (Defazio et al. 2024)."""
    name, schedule = config.optimizer.name, config.optimizer.lr_scheduler
    if not schedule.startswith("constant"):
        message = (
            f"{schedule} has no place with {name}, whose average takes the place of a falling "
            "rate: use constant or constant_with_warmup"
        )
        yield "optimizer.lr_scheduler", message
    if config.train.ema_decay is not None:
        yield "train.ema_decay", f"{name} averages the weights itself: remove this"


def prodigy_errors(optimizer: OptimizerConfig) -> Errors:
    for key in type(optimizer).model_fields:
        is_rate = key == "learning_rate" or key.endswith("_lr")
        value = getattr(optimizer, key)
        if is_rate and value is not None and 0 < value < PRODIGY_RATE / 100:
            message = (
                f"{value:g} is a rate for AdamW: Prodigy finds the rate itself and multiplies it "
                f"with this number. Remove the key, or set it near {PRODIGY_RATE}"
            )
            yield f"optimizer.{key}", message
    for key in ("text_encoder_lr", "lora_plus_ratio"):
        if getattr(optimizer, key) is not None:
            message = "Prodigy finds one rate for all that it trains: remove it, or use adamw"
            yield f"optimizer.{key}", message


def output_errors(folder: Path) -> Errors:
    """A run folder is the run's own, since files in it are replaced and removed."""
    try:
        place = folder.resolve()
        here, home = Path.cwd().resolve(), Path.home().resolve()
    except (OSError, RuntimeError) as error:
        yield "output_dir", f"cannot be used: {error}"
        return
    for other, name in ((here, "the working directory"), (home, "your home folder")):
        if other.is_relative_to(place):
            message = f"must be a folder of its own, not {name} or one above it: {folder}"
            yield "output_dir", message
            return


def folder_errors(path: str, folder: Path | None) -> Errors:
    """A folder that is asked for and cannot be read."""
    if folder is None:
        return
    try:
        if not folder.is_dir():
            what = "this is a file" if folder.exists() else "no such folder"
            yield path, f"{what}: {folder}"
    except OSError as error:
        yield path, f"cannot be read ({error.strerror}): {folder}"


def reduce_warmup(config: AnyConfig) -> tuple[AnyConfig, list[str]]:
    """The config with a warm-up that fits into its steps, and what there is to say about it."""
    steps, warmup = config.train.max_train_steps, config.optimizer.lr_warmup_steps
    if warmup < steps:
        return config, []
    fitting = int(steps * WARMUP_SHARE)
    optimizer = config.optimizer.model_copy(update={"lr_warmup_steps": fitting})
    note = (
        f"optimizer.lr_warmup_steps: {warmup} steps of warm-up do not fit into "
        f"train.max_train_steps={steps}; the warm-up takes {fitting}"
    )
    return config.model_copy(update={"optimizer": optimizer}), [note]


def package_errors(config: Config) -> Errors:
    """Values that require an optional package, where it is not installed."""
    for path, packages in config.optional_packages.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        for choice in value if isinstance(value, list) else [value]:
            package = packages.get(choice)
            if package and importlib.util.find_spec(package) is None:
                command = f"pip install {PIP_NAMES.get(package, package)}"
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
