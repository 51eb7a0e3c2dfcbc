"""What a foreign config is read by: its keys, what became of each, and the YAML that results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from trainers.config import DreamBoothConfig
from trainers.config.base_sections import Section

HEAD = """# Imported from {tool}. Above each key stands the one that it comes from.
# Read it through: what has no equal here is listed at the end.
"""
MISSING = object()
# in the order of the configs that are shipped
SECTIONS = (
    "output_dir",
    "seed",
    "model",
    "lora",
    "data",
    "objective",
    "optimizer",
    "train",
    "checkpoint",
    "validation",
    "tracking",
    "hub",
)


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Rule:
    """How one foreign key becomes one of ours.

    convert: the value, which may return None to leave our default; note: how the meaning differs.
    """

    theirs: str
    ours: str
    convert: Callable[[Any], Any] = same
    note: str = ""


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str  # the foreign key
    note: str = ""


class ForeignConfig:
    """The keys of another trainer's config; each is used, has no effect here, or is left over."""

    def __init__(self, tool: str, values: Mapping[str, Any]) -> None:
        self.tool, self.values = tool, flatten(values)
        self.settings: dict[str, Setting] = {}
        self.used: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a foreign key, which then counts as used."""
        self.used.add(name)
        return self.values.get(name, default)

    def put(self, ours: str, value: Any, source: str, note: str = "") -> None:
        """Set one of our keys; None leaves the default."""
        if value is not None:
            self.settings[ours] = Setting(value, source, note)

    def leave_out(self, section: str, source: str) -> None:
        """Set a section to null, which is what training all weights means for lora."""
        kept = {path: s for path, s in self.settings.items() if not path.startswith(f"{section}.")}
        self.settings = kept | {section: Setting(None, source)}

    def apply(self, rules: Iterable[Rule]) -> None:
        """Later rules win over earlier ones with the same key of ours."""
        for rule in rules:
            value = self.values.get(rule.theirs, MISSING)
            if value is not MISSING and value is not None:
                self.used.add(rule.theirs)
                self.put(rule.ours, rule.convert(value), rule.theirs, rule.note)

    def ignore(self, names: Iterable[str]) -> None:
        """Count keys as used that say nothing about the training here."""
        self.used.update(names)

    def value(self, ours: str, default: Any = None) -> Any:
        """The value that one of our keys has so far."""
        return self.settings[ours].value if ours in self.settings else default

    def leftovers(self) -> dict[str, Any]:
        """The foreign keys without an equal here; those that are off say nothing."""
        left = {}
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, "", [], {}):
                left[name] = value
        return left

    def tree(self) -> dict[str, Any]:
        """Our sections, as the YAML has them."""
        tree: dict[str, Any] = {}
        for path, setting in self.settings.items():
            section, _, key = path.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[key] = setting.value
        return tree

    def to_yaml(self) -> str:
        """The config, with a comment at each key, in the order of our own configs."""
        lines = [HEAD.format(tool=self.tool)]
        for section in SECTIONS:
            if section in self.settings:
                lines += [*commented(section, self.settings[section], ""), ""]
            keys = {path.partition(".")[2]: path for path in self.settings}
            keys = {key: path for key, path in keys.items() if path == f"{section}.{key}"}
            if keys:
                lines.append(f"{section}:")
                for key in sorted(keys, key=key_order(section).index):
                    lines += commented(key, self.settings[keys[key]], "  ")
                lines.append("")
        left = self.leftovers()
        if left:
            lines.append("# No equal here:")
            lines += [f"#   {name}: {scalar(value)}" for name, value in left.items()]
        return "\n".join(lines).rstrip() + "\n"


def key_order(section: str) -> list[str]:
    """The keys of a section, as its class has them."""
    annotation = DreamBoothConfig.model_fields[section].annotation
    # a section may be left out, and then its type is a union
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return list(part.model_fields)
    raise LookupError(f"{section} is not a section")


def commented(key: str, setting: Setting, indent: str) -> list[str]:
    note = f". {setting.note}" if setting.note else ""
    head, value = f"{indent}# {setting.source}{note}", setting.value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [head, f"{indent}{key}:", *(f"{indent}  - {scalar(part)}" for part in value)]
    return [head, f"{indent}{key}: {scalar(value)}"]


def scalar(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as section.key; lists are kept as they are."""
    flat = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


# Conversions that several trainers need


def sides(value: Any) -> int | list[int] | None:
    """The side of the training pictures in "1024,1024", "1024x1024" or 512; of [512, 768] both."""
    if isinstance(value, (list, tuple)):
        numbers = [number for number in map(sides, value) if isinstance(number, int)]
        return numbers[0] if len(numbers) == 1 else numbers or None
    digits = str(value).replace("x", ",").replace("X", ",").split(",")[0].strip()
    return int(float(digits)) if digits.replace(".", "", 1).isdigit() else None


def number(value: Any) -> float | int | None:
    """A number that may be written as text."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return int(found) if found.is_integer() and "e" not in str(value).lower() else found


def is_on(value: Any) -> bool:
    """Whether a switch is on that may be written as text."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def only_if_on(value: Any) -> bool | None:
    return True if is_on(value) else None


def positive(value: Any) -> float | int | None:
    """A number above zero, which elsewhere stands for off."""
    found = number(value)
    return found if found and found > 0 else None


def times(value: Any) -> int:
    """How often something counts: a whole number from 1 on."""
    return max(1, round(number(value) or 1))


@dataclass(frozen=True)
class Choice:
    """A conversion that looks a name up, whatever its case and its separators."""

    table: Mapping[str, Any]

    def __call__(self, value: Any) -> Any:
        return self.table.get(str(value).strip().lower().replace("-", "_"))


def choose(table: Mapping[str, Any]) -> Choice:
    return Choice(table)


def put_kept_tags(config: ForeignConfig, kept: Any, source: str, note: str = "") -> None:
    """How many tags stay in place, where any move: elsewhere the number says nothing."""
    if config.value("data.shuffle_tags") or config.value("data.tag_dropout"):
        config.put("data.keep_tags", positive(kept), source, note)


OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "adamw_bf16": "adamw",
    "adamw8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adam_8bit": "adamw_8bit",
    "bnb_adamw8bit": "adamw_8bit",
    "pagedadamw8bit": "paged_adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "bnb_adamw8bit_paged": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "lion": "lion",
    "came": "came",
    "muon": "muon",
    "adamwschedulefree": "schedule_free",
    "schedule_free_adamw": "schedule_free",
    "adamw_schedulefree": "schedule_free",
    "prodigyplus": "prodigy_schedule_free",
    "prodigy_plus_schedule_free": "prodigy_schedule_free",
    "prodigyplus.prodigyplusschedulefree": "prodigy_schedule_free",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
}
TRACKERS = {
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "all": ["tensorboard", "wandb"],
    "none": [],
}

# keys that the scripts of diffusers, sd-scripts and SimpleTuner call alike
SHARED_RULES = [
    Rule("learning_rate", "optimizer.learning_rate", number),
    Rule("text_encoder_lr", "optimizer.text_encoder_lr", number),
    Rule("lr_scheduler", "optimizer.lr_scheduler", choose(SCHEDULES)),
    Rule("train_batch_size", "train.train_batch_size", number),
    Rule("gradient_accumulation_steps", "train.gradient_accumulation_steps", number),
    Rule("gradient_checkpointing", "train.gradient_checkpointing", only_if_on),
    Rule("max_grad_norm", "train.max_grad_norm", positive),
    Rule("resolution", "data.resolution", sides),
    Rule("seed", "seed", number),
]
