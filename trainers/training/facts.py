"""What decides the result of a run, compared when it is resumed.

That is its pictures with captions and labels, the base model's files, the precision, the size of
the global batch, and each key of the config but those of `CHANGEABLE_KEYS`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainers.config import Config, DreamBoothConfig
from trainers.config.photo_sections import concept_name
from trainers.config.validation_metrics import chosen_metric, drawing_keys
from trainers.errors import UserError, name_some

Facts = dict[str, Any]  # JSON values

STEPS_KEY = "train.max_train_steps"
# what an earlier version did, where that is not the default now
EARLIER_DEFAULTS = {"data.buckets": False}
# what a run that is trained longer may change: a short one's warm-up was reduced to fit
SCHEDULE_KEYS = (STEPS_KEY, "optimizer.lr_warmup_steps")
INITIAL_LORA = "initial LoRA"
# by what the best weights are chosen, and on which pictures
JUDGED_BY, HELD_OUT = "judged by", "held out"

# sections, and keys, that may change between two parts of a run
CHANGEABLE_KEYS = {
    "output_dir",
    "checkpoint",
    "validation",
    "tracking",
    "hub",
    "model.modulation_cache",
    "model.offload",
    "train.gradient_checkpointing",
    "train.auto_micro_batch",
    "train.max_skipped_steps",
    "train.on_divergence",
    "train.memory",
    "train.compile",
    "train.attention",
    # compared as what it came to
    "train.mixed_precision",
    # their product with the number of processes is compared
    "train.train_batch_size",
    "train.gradient_accumulation_steps",
    # the files and captions themselves are compared instead of where they lie
    "lora.init_from",
    "model.pretrained_model_name_or_path",
    "model.config",
    "model.revision",
    "model.variant",
    "data.instance_data_dir",
    "data.image_dir",
    "data.bad_dir",
    "data.dataset_name",
    "data.class_data_dir",
    "data.held_out_dir",
    "data.mask_dir",
    "data.cache",
    "data.cache_dir",
    # the same within rounding
    "data.encode_batch_size",
    "data.in_memory",
    "data.skip_corrupt",
    "data.strict",
}

PATTERN_KEYS = "lora.rank_pattern", "lora.alpha_pattern"
# class pictures are drawn as the validation prompts are
CLASS_PICTURE_KEYS = ("negative_prompt", "num_inference_steps", "guidance_scale")
# a run that ends early does so after a validation, by what that measures
EARLY_STOP_KEYS = ("validation_steps", "held_out_pictures")

ADVICE = (
    "Restore these to go on from there, or set another output_dir for a new run. Free to change: "
    "where pictures and base lie; how the global batch is split into micro-batches and processes; "
    "memory and speed options; checkpoint, validation, tracking and hub; and, with a constant "
    "learning rate or checkpoint.extend=true, train.max_train_steps, which makes a run longer."
)
EXTEND_ADVICE = """The learning rate of each step depends on the number of steps. Choose:
  checkpoint.extend=true goes on from there, with the learning rates of the new length
  another output_dir trains from step 0 with one schedule
  the old values finish the run as it was planned"""


def resume_facts(config: Config, accelerator: Accelerator, inputs: Facts) -> Facts:
    """All that must be equal for a resumed run to be the same run.

    inputs: "pictures", by pool as `describe_pictures` has them, "base", a digest by part, and
    "held out", what a validation measures.
    """
    train = config.train
    micro_batches = train.gradient_accumulation_steps * accelerator.num_processes
    facts = {
        **inputs,
        "mixed precision": config.train.mixed_precision,
        "global batch": train.train_batch_size * micro_batches,
        "config": config_facts(config),
        JUDGED_BY: {
            "metric": chosen_metric(config),
            **{key: getattr(config.validation, key) for key in drawing_keys(config)},
        },
    }
    # as it will be read back
    return json.loads(json.dumps(facts))


def config_facts(config: Config) -> Facts:
    """The values that decide the result, by section.key."""
    facts = {}
    for name, value in config.model_dump(mode="json").items():
        if name in CHANGEABLE_KEYS:
            continue
        keys = value.items() if isinstance(value, dict) else ()
        paths = {f"{name}.{key}": item for key, item in keys} or {name: value}
        facts |= {path: item for path, item in paths.items() if path not in CHANGEABLE_KEYS}
    if facts.get("data.concepts"):
        facts |= concept_facts(facts["data.concepts"])
    if isinstance(config, DreamBoothConfig):
        # however they are written
        sides = config.data.resolutions
        facts["data.resolution"] = sides if len(sides) > 1 else sides[0]
        # of several patterns that name a layer the first counts
        facts |= {path: [*facts[path].items()] for path in PATTERN_KEYS if path in facts}
    if config.optimizer.lr_scheduler.startswith("constant"):
        # such a run may be made longer
        del facts[STEPS_KEY]
    deciding = []
    if isinstance(config, DreamBoothConfig) and config.data.class_sets:
        deciding += CLASS_PICTURE_KEYS
    if config.train.early_stop:
        deciding += [*EARLY_STOP_KEYS, *drawing_keys(config)]
    for key in deciding:
        facts[f"validation.{key}"] = getattr(config.validation, key)
    return facts


def concept_facts(concepts: Sequence[Facts]) -> Facts:
    """The values of each concept that decide the result, by path, and the names in their order, in
    which their pictures are drawn."""
    names = [concept_name(concept["name"], i) for i, concept in enumerate(concepts)]
    facts = {"data.concepts": names}
    for name, concept in zip(names, concepts, strict=True):
        for key, value in concept.items():
            if key != "name" and f"data.{key}" not in CHANGEABLE_KEYS:
                facts[f"data.concepts[{name}].{key}"] = value
    return facts


def check_facts(folder: Path, saved: Facts, current: Facts, config: Config) -> None:
    """Raises: UserError naming all that decides the result and has changed.

    What a checkpoint of an earlier version does not say cannot be compared, which is a warning.
    """
    optional = ("config", INITIAL_LORA, JUDGED_BY, HELD_OUT)
    unknown = [name for name in current if name not in saved and name not in optional]
    if unknown:
        warnings.warn(
            f"{folder} was written by an earlier version and does not say which "
            f"{', '.join(unknown)} it was made with: whether they are the same is not checked",
            stacklevel=2,
        )
    differences = []
    for name, explain in EXPLAIN.items():
        if name in current and name in saved:
            differences += explain(saved[name], current[name])
    for name in ("mixed precision", "global batch"):
        if name in saved and saved[name] != current[name]:
            differences.append(f"{name}: was {saved[name]}, is {current[name]}")
    differences += explain_initial_lora(saved.get(INITIAL_LORA), current.get(INITIAL_LORA))
    # an earlier version had the keys beside the other facts
    saved_config = saved.get("config", saved)
    changes = explain_config(saved_config, current["config"], config)
    movable = SCHEDULE_KEYS if is_longer(saved_config, current["config"]) else ()
    schedule = {key: changes.pop(key) for key in movable if key in changes}
    if schedule and not config.checkpoint.extend:
        changes = schedule | changes
    if lines := [*differences, *changes.values()]:
        head = f"{folder} was made by another configuration, or from other files:"
        advice = EXTEND_ADVICE if lines == [*schedule.values()] else ADVICE
        raise UserError("\n".join([head, *(f"  {line}" for line in lines), advice]))


def is_longer(saved: Facts, current: Facts) -> bool:
    """Whether a run has not fewer steps than before, as far as its schedule depends on them."""
    before, now = saved.get(STEPS_KEY), current.get(STEPS_KEY)
    return before is None or now is None or now >= before


def find_extension(manifest: Facts, config: Config) -> Facts | None:
    """How a run that passed `check_facts` goes on beyond its own plan, for the next manifests.

    None where it does not. A run that was over early is opened again once for each number of
    steps, so that the same command does not train on each time.
    """
    facts, end = manifest["facts"], manifest.get("end", "")
    step, steps = manifest["step"], config.train.max_train_steps
    before = facts.get("config", facts).get(STEPS_KEY)
    has_grown = before is not None and before < steps
    is_known = any(entry["max_train_steps"] == steps for entry in manifest.get("extensions", ()))
    is_opened = bool(end) and config.checkpoint.extend and step < steps and not is_known
    if not (has_grown or is_opened):
        return None
    return {"from_step": step, "max_train_steps": steps, "before": before, "end": end}


def is_judged_alike(saved: Facts, current: Facts) -> bool:
    """Whether figures of a checkpoint's validations can be compared with those to come; what an
    earlier version does not say is taken to be so."""
    known = [name for name in (JUDGED_BY, HELD_OUT) if name in saved]
    return all(saved[name] == current.get(name) for name in known)


def check_length(folder: Path, step: int, config: Config) -> None:
    """Raises: UserError when a run is to end before the checkpoint from which it is to go on."""
    if step > config.train.max_train_steps:
        raise UserError(
            f"train.max_train_steps is {config.train.max_train_steps}, but {folder} has {step} "
            f"steps already. Set at least {step}; or name an earlier checkpoint by "
            "checkpoint.resume_from_checkpoint; or set another output_dir for a new run"
        )


def explain_initial_lora(saved: str | None, current: str | None) -> list[str]:
    """A line where the LoRA to start from is another one: its place may change, its digest not."""
    if saved == current:
        return []
    digests = ["none" if digest is None else f"sha256 {digest[:16]}" for digest in (saved, current)]
    return [f"lora.init_from: another LoRA, was {digests[0]}, is {digests[1]}"]


def explain_config(saved: Facts, current: Facts, config: Config) -> dict[str, str]:
    """A line for each key with another value, by key.

    A key that an earlier version did not have yet had its default; one that is no more is let be.
    """
    lines, switched = {}, []
    for section in type(config).model_fields:
        was_null, is_null = (facts.get(section, ...) is None for facts in (saved, current))
        if was_null != is_null:
            switched.append(section)
            lines[section] = f"{section}: {'was null' if was_null else 'is null'}"
    defaults = config_facts(type(config)()) | EARLIER_DEFAULTS
    for name, now in current.items():
        # where the number of steps is not noted, the schedule is another one
        if name.split(".")[0] in switched or (name == STEPS_KEY and name not in saved):
            continue
        before = saved.get(name, defaults.get(name))
        if before != now:
            lines[name] = f"{name}: was {show(before)}, is {show(now)}"
    return lines


def show(value: Any) -> str:
    """A value as YAML has it."""
    return value if value and isinstance(value, str) else json.dumps(value)


def explain_pictures(saved: Mapping[str, Facts], current: Mapping[str, Facts]) -> list[str]:
    """A line for each pool of pictures that has changed, with the names of the files."""
    lines = []
    for pool in dict.fromkeys([*saved, *current]):
        before, now = saved.get(pool, {}), current.get(pool, {})
        if before.get("digest") != now.get("digest"):
            lines.append(f"{pool} pictures: {explain_pool(before, now)}")
    return lines


def explain_pool(saved: Facts, current: Facts) -> str:
    before, now = saved.get("files"), current.get("files")
    if not before or not now:
        counts = f"{saved.get('count', 0)} before, {current.get('count', 0)} now"
        return f"{counts}; contents, captions, labels or their order are not the same"
    common = [name for name in before if name in now]
    changes = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in common if before[name][0] != now[name][0]],
        "with another caption or label": [n for n in common if before[n][1] != now[n][1]],
    }
    parts = [f"{verb} {name_some(names)}" for verb, names in changes.items() if names]
    return "; ".join(parts) or "in another order"


def explain_base(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """A line with the parts of the base model whose files have changed, if any have."""
    parts = dict.fromkeys([*saved, *current])
    changed = [part for part in parts if saved.get(part) != current.get(part)]
    return [f"base model: other files of {', '.join(changed)}"] if changed else []


EXPLAIN = {"pictures": explain_pictures, "base": explain_base}
