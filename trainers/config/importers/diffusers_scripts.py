"""The example scripts of diffusers: a command line, as a shell script or a text file has it."""

from __future__ import annotations

import shlex
from typing import Any

from trainers.config.family_facts import family_named
from trainers.config.importers.base import (
    SHARED_RULES,
    TRACKERS,
    ForeignConfig,
    Rule,
    choose,
    is_on,
    number,
    only_if_on,
    positive,
)
from trainers.errors import UserError

OPTIMIZERS = {"adamw": "adamw", "prodigy": "prodigy"}
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "no": "no"}

RULES = [
    *SHARED_RULES,
    Rule("pretrained_model_name_or_path", "model.pretrained_model_name_or_path"),
    Rule("revision", "model.revision"),
    Rule("variant", "model.variant"),
    Rule("max_sequence_length", "model.max_sequence_length", number),
    Rule("guidance_scale", "model.guidance_scale", number),
    Rule("lora_dropout", "lora.dropout", positive),
    Rule("lora_layers", "lora.target_modules", lambda names: str(names).split(",")),
    Rule("use_dora", "lora.use_dora", only_if_on),
    Rule("instance_data_dir", "data.instance_data_dir"),
    Rule("dataset_name", "data.dataset_name"),
    Rule("image_column", "data.image_column"),
    Rule("caption_column", "data.caption_column"),
    Rule("instance_prompt", "data.instance_prompt"),
    Rule("class_data_dir", "data.class_data_dir"),
    Rule("class_prompt", "data.class_prompt"),
    Rule("prior_loss_weight", "data.prior_loss_weight", number),
    Rule("random_flip", "data.random_flip", only_if_on),
    Rule("snr_gamma", "objective.snr_gamma", positive),
    Rule("logit_mean", "objective.logit_mean", number),
    Rule("logit_std", "objective.logit_std", number),
    Rule("mode_scale", "objective.mode_scale", number),
    Rule("optimizer", "optimizer.name", choose(OPTIMIZERS)),
    Rule("use_8bit_adam", "optimizer.name", lambda on: "adamw_8bit" if is_on(on) else None),
    Rule("adam_weight_decay", "optimizer.weight_decay", number),
    Rule("adam_epsilon", "optimizer.eps", number),
    Rule("lr_warmup_steps", "optimizer.lr_warmup_steps", positive),
    Rule("lr_num_cycles", "optimizer.lr_num_cycles", number),
    Rule("lr_power", "optimizer.lr_power", number),
    Rule("max_train_steps", "train.max_train_steps", number),
    Rule("mixed_precision", "train.mixed_precision", choose(PRECISIONS)),
    Rule("train_text_encoder", "train.train_text_encoder", only_if_on),
    Rule("checkpointing_steps", "checkpoint.checkpointing_steps", number),
    Rule("checkpoints_total_limit", "checkpoint.checkpoints_total_limit", positive),
    Rule("validation_prompt", "validation.prompts", lambda prompt: [prompt]),
    Rule("num_validation_images", "validation.num_images", number),
    Rule("report_to", "tracking.report_to", choose(TRACKERS)),
    Rule("push_to_hub", "hub.push_to_hub", only_if_on),
    Rule("hub_model_id", "hub.hub_model_id"),
    Rule("output_dir", "output_dir"),
]
WITHOUT_EFFECT = (
    "cache_latents dataloader_num_workers allow_tf32 logging_dir resume_from_checkpoint "
    "validation_epochs num_processes config_file upcast_before_saving"
).split()


def is_command(text: str) -> bool:
    return "train_dreambooth" in text and ".py" in text and "--" in text


def read(text: str) -> ForeignConfig:
    """Raises: UserError for a script that trains something else."""
    script, flags = parse_command(text)
    config = ForeignConfig("the diffusers example scripts", flags)
    config.put("model.family", find_family(script), script)
    config.apply(RULES)
    if "lora" in script:
        rank = number(config.take("rank", 4))
        note = "" if "rank" in flags else "Its default is 4"
        config.put("lora.rank", rank, "rank", note)
        config.put("lora.alpha", number(config.take("lora_alpha", rank)), "lora_alpha")
    else:
        config.leave_out("lora", script)
    config.put("data.center_crop", is_on(config.take("center_crop")), "center_crop")
    if is_on(config.take("with_prior_preservation")):
        count = number(config.take("num_class_images", 100))
        config.put("data.num_class_images", count, "num_class_images")
    else:
        config.ignore(["num_class_images"])
    if config.take("weighting_scheme") in ("logit_normal", "mode"):
        density = config.values["weighting_scheme"]
        config.put("objective.density", density, "weighting_scheme")
    config.ignore(WITHOUT_EFFECT)
    return config


def parse_command(text: str) -> tuple[str, dict[str, Any]]:
    """The name of the script, and its flags; a flag without a value is on."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        words = shlex.split("\n".join(lines).replace("\\\n", " "))
    except ValueError as error:
        raise UserError(f"the command cannot be parsed: {error}") from None
    starts = [i for i, word in enumerate(words) if "train_dreambooth" in word]
    script = words[starts[0]].rpartition("/")[2]
    flags: dict[str, Any] = {}
    name = ""
    for word in words[starts[0] + 1 :]:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            flags[name] = value if equals else True
        elif name and flags[name] is True:
            flags[name] = word
    return script, flags


def find_family(script: str) -> str:
    family = family_named(script.removesuffix(".py"))
    if family is None:
        raise UserError(f"{script} trains a family that is not supported here")
    return family
