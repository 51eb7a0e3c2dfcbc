"""SimpleTuner: the JSON of config/config.json, whose keys may begin with --."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.config.family_facts import family_named
from trainers.config.importers.adapters import put_kind, put_lokr
from trainers.config.importers.base import (
    OPTIMIZERS,
    SHARED_RULES,
    TRACKERS,
    ForeignConfig,
    Rule,
    choose,
    is_on,
    number,
    only_if_on,
    positive,
    put_kept_tags,
    sides,
    times,
)
from trainers.config.importers.objective import put_loss
from trainers.config.importers.photo_sets import ForeignSets, convert, put_sets

PRECISIONS = {"int8_quanto": "int8", "fp8_quanto": "fp8", "nf4_bnb": "nf4", "int4_quanto": "nf4"}


def visits(again: Any) -> int:
    """How often a set counts that comes `again` so many times."""
    return times((number(again) or 0) + 1)


RULES = [
    *SHARED_RULES,
    Rule("model_family", "model.family", family_named),
    Rule("pretrained_model_name_or_path", "model.pretrained_model_name_or_path"),
    Rule("model_revision", "model.revision"),
    Rule("revision", "model.revision"),
    Rule("variant", "model.variant"),
    Rule("base_model_precision", "model.quantization", choose(PRECISIONS)),
    Rule("tokenizer_max_length", "model.max_sequence_length", number),
    Rule("lora_rank", "lora.rank", number),
    Rule("lora_alpha", "lora.alpha", number),
    Rule("lora_dropout", "lora.dropout", positive),
    Rule("instance_data_dir", "data.instance_data_dir"),
    Rule("instance_prompt", "data.instance_prompt"),
    Rule("caption_dropout_probability", "data.caption_dropout", positive),
    Rule("snr_gamma", "objective.snr_gamma", positive),
    Rule("input_perturbation", "objective.input_perturbation", positive),
    Rule("flow_schedule_shift", "objective.shift", positive),
    Rule("flow_schedule_auto_shift", "objective.shift", lambda on: "auto" if is_on(on) else None),
    Rule("optimizer", "optimizer.name", choose(OPTIMIZERS)),
    Rule("lr_warmup_steps", "optimizer.lr_warmup_steps", positive),
    Rule("lr_num_cycles", "optimizer.lr_num_cycles", number),
    Rule("lr_power", "optimizer.lr_power", number),
    Rule("max_train_steps", "train.max_train_steps", positive),
    Rule("checkpointing_steps", "checkpoint.checkpointing_steps", number),
    Rule("checkpoint_step_interval", "checkpoint.checkpointing_steps", number),
    Rule("checkpoints_total_limit", "checkpoint.checkpoints_total_limit", positive),
    Rule("validation_steps", "validation.validation_steps", number),
    Rule("validation_step_interval", "validation.validation_steps", number),
    Rule("validation_prompt", "validation.prompts", lambda prompt: [prompt] if prompt else None),
    Rule("validation_negative_prompt", "validation.negative_prompt"),
    Rule("validation_guidance", "validation.guidance_scale", number),
    Rule("validation_num_inference_steps", "validation.num_inference_steps", number),
    Rule("validation_seed", "validation.seed", number),
    Rule("num_validation_images", "validation.num_images", number),
    Rule("report_to", "tracking.report_to", choose(TRACKERS)),
    Rule("tracker_project_name", "tracking.project_name"),
    Rule("push_to_hub", "hub.push_to_hub", only_if_on),
    Rule("hub_model_id", "hub.hub_model_id"),
    Rule("output_dir", "output_dir"),
]
SETS = "data_backend_config"
# of each of them
SET_RULES = [
    Rule("id", "name"),
    Rule("instance_data_dir", "instance_data_dir"),
    Rule("instance_prompt", "instance_prompt"),
    Rule("dataset_name", "dataset_name"),
    Rule("repeats", "repeats", visits),
]
WITHOUT_EFFECT = (
    "model_type aspect_bucket_rounding minimum_image_size resolution_type "
    "num_train_epochs resume_from_checkpoint tracker_run_name validation_torch_compile "
    "disable_benchmark disable_tf32 skip_file_discovery validation_resolution"
).split()


def is_config(tree: Mapping[str, Any]) -> bool:
    names = {name.lstrip("-") for name in tree}
    return "data_backend_config" in names or {"model_family", "model_type"} <= names


def read(tree: Mapping[str, Any]) -> ForeignConfig:
    config = ForeignConfig("SimpleTuner", {name.lstrip("-"): tree[name] for name in tree})
    config.apply(RULES)
    for name in config.values:
        # with the family's name before it
        if name.endswith("_guidance_value"):
            config.put("model.guidance_scale", number(config.take(name)), name)
    put_loss(config)
    read_lycoris(config)
    read_backends(config)
    if str(config.values.get("model_type", "lora")) == "full":
        config.leave_out("lora", "model_type")
    precision = config.take("mixed_precision")
    if precision in ("bf16", "fp16", "no"):
        config.put("train.mixed_precision", precision, "mixed_precision")
    if is_on(config.take("use_ema")):
        decay = number(config.take("ema_decay", 0.995))
        config.put("train.ema_decay", decay, "ema_decay")
    config.ignore(WITHOUT_EFFECT)
    return config


def with_lycoris(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the LyCORIS file that it names in it, where that can be found and read."""
    found = dict(tree)
    for key in [name for name in tree if name.lstrip("-") == "lycoris_config"]:
        for place in (folder, folder.parent, Path.cwd()):
            try:
                content = json.loads((place / str(tree[key])).read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                found[key] = content
                break
    return found


def read_lycoris(config: ForeignConfig) -> None:
    """The kind of adapter, where LyCORIS makes it; what it says of single layers is left over."""
    if str(config.take("lora_type", "standard")).lower() != "lycoris":
        return
    prefix = "lycoris_config."
    config.apply(
        [
            Rule(f"{prefix}linear_dim", "lora.rank", number),
            Rule(f"{prefix}linear_alpha", "lora.alpha", number),
        ]
    )
    kind = put_kind(config, config.values.get(f"{prefix}algo", "lora"), f"{prefix}algo")
    if kind == "lokr":
        keys = (f"{prefix}{key}" for key in ("factor", "full_matrix", "decompose_both"))
        put_lokr(config, *keys)
    modules = f"{prefix}apply_preset.target_module"
    if set(config.values.get(modules) or ()) == {"Attention", "FeedForward"}:
        config.put("lora.target_modules", "attention+mlp", modules)
        config.ignore([modules])
    if number(config.values.get(f"{prefix}multiplier")) == 1:
        config.ignore([f"{prefix}multiplier"])


def read_backends(config: ForeignConfig) -> None:
    """The sets of pictures, where the file holds them itself."""
    backends = config.values.get("data_backend_config")
    if not isinstance(backends, list):
        return
    config.used.add("data_backend_config")
    sets = ForeignSets()
    for backend in backends:
        is_set = isinstance(backend, Mapping) and backend.get("dataset_type", "image") == "image"
        if not is_set or is_on(backend.get("disabled")):
            continue
        keys = convert(backend, SET_RULES)
        if is_on(backend.get("is_regularisation_data")):
            sets.shared |= {"class_data_dir": keys.get("instance_data_dir")}
            continue
        # one size and one way of captions for all: those of the first set
        if not sets.learnt:
            config.put("data.resolution", sides(backend.get("resolution")), SETS)
            part = ForeignConfig("", backend)
            read_captions(part)
            config.settings |= part.settings
        sets.add(keys)
    put_sets(config, sets, SETS)


def read_captions(backend: ForeignConfig) -> None:
    """How the captions of one set of pictures vary."""
    is_split = not is_on(backend.take("disable_multiline_split"))
    if backend.take("caption_strategy") == "textfile" and is_split:
        note = "Each line of a text file is a caption"
        backend.put("data.caption_lines", "choose", "caption_strategy", note)
    if is_on(backend.take("prepend_instance_prompt")):
        prompt = backend.take("instance_prompt")
        backend.put("data.caption_prefix", prompt, "prepend_instance_prompt")
    shuffles = only_if_on(backend.take("caption_shuffle.enable"))
    backend.put("data.shuffle_tags", shuffles, "caption_shuffle.enable")
    if shuffles:
        count = positive(backend.take("caption_shuffle.count", 1))
        backend.put("data.caption_variants", count, "caption_shuffle.count")
        kept = backend.take("caption_shuffle.position_start")
        put_kept_tags(backend, kept, "caption_shuffle.position_start")
