"""OneTrainer: the JSON of a preset or of a saved config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.config.family_facts import family_named
from trainers.config.importers.adapters import put_kind
from trainers.config.importers.base import (
    OPTIMIZERS,
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
from trainers.config.importers.objective import put_t_range
from trainers.config.importers.photo_sets import ForeignSets, convert, put_sets

SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_hard_restarts": "cosine_with_restarts",
}
DENSITIES = {"uniform": "uniform", "logit_normal": "logit_normal", "sigmoid": "logit_normal"}
WEIGHTS = {"nfloat_4": "nf4", "int_8": "int8", "float_8": "fp8", "float_8_weight": "fp8"}
PRECISIONS = {"bfloat_16": "bf16", "float_16": "fp16", "float_32": "no", "tfloat_32": "no"}

RULES = [
    Rule("model_type", "model.family", family_named),
    Rule("base_model_name", "model.pretrained_model_name_or_path"),
    Rule("prior.weight_dtype", "model.quantization", choose(WEIGHTS)),
    Rule("unet.weight_dtype", "model.quantization", choose(WEIGHTS)),
    Rule("transformer.weight_dtype", "model.quantization", choose(WEIGHTS)),
    Rule("transformer.guidance_scale", "model.guidance_scale", number),
    Rule("lora_rank", "lora.rank", number),
    Rule("lora_decompose", "lora.use_dora", only_if_on),
    Rule("dropout_probability", "lora.dropout", positive),
    Rule("resolution", "data.resolution", sides),
    Rule("aspect_ratio_bucketing", "data.buckets", is_on),
    Rule("offset_noise_weight", "objective.noise_offset", positive),
    Rule("timestep_distribution", "objective.density", choose(DENSITIES)),
    Rule("timestep_shift", "objective.shift", number),
    Rule("dynamic_timestep_shifting", "objective.shift", lambda on: "auto" if is_on(on) else None),
    Rule("optimizer.optimizer", "optimizer.name", choose(OPTIMIZERS)),
    Rule("optimizer.weight_decay", "optimizer.weight_decay", number),
    Rule("learning_rate", "optimizer.learning_rate", number),
    Rule("text_encoder.learning_rate", "optimizer.text_encoder_lr", positive),
    Rule("learning_rate_scheduler", "optimizer.lr_scheduler", choose(SCHEDULES)),
    Rule("batch_size", "train.train_batch_size", number),
    Rule("gradient_accumulation_steps", "train.gradient_accumulation_steps", number),
    Rule("clip_grad_norm", "train.max_grad_norm", positive),
    Rule("train_dtype", "train.mixed_precision", choose(PRECISIONS)),
    Rule("text_encoder.train", "train.train_text_encoder", only_if_on),
    Rule("seed", "seed", number),
]
SETS = "concepts"
# of each of them
SET_RULES = [
    Rule("name", "name"),
    Rule("path", "instance_data_dir"),
    Rule("balancing", "repeats", times),
]
WITHOUT_EFFECT = (
    "training_method output_model_format output_dtype cache_dir weight_dtype vae.weight_dtype "
    "text_encoder.weight_dtype text_encoder_2.weight_dtype text_encoder_3.weight_dtype "
    "latent_caching image_caching text_caching train_device temp_device attention_mechanism "
    "dataloader_threads caching_threads backup_after backup_after_unit "
    "tensorboard_expose tensorboard_port lora_weight_dtype workspace_dir __version prior.train "
    "unet.train transformer.train"
).split()


def is_config(tree: Mapping[str, Any]) -> bool:
    return "training_method" in tree or {"base_model_name", "model_type"} <= set(tree)


def read(tree: Mapping[str, Any]) -> ForeignConfig:
    config = ForeignConfig("OneTrainer", tree)
    config.apply(RULES)
    destination = str(config.take("output_model_destination", "models/lora"))
    folder = destination.removesuffix(".safetensors")
    config.put("output_dir", folder, "output_model_destination", "A folder here, not a file")
    alpha = number(config.take("lora_alpha", 1))
    note = "" if "lora_alpha" in config.values else "Its default is 1; ours is the rank"
    config.put("lora.alpha", alpha, "lora_alpha", note)
    put_kind(config, config.values.get("peft_type", "LORA"), "peft_type")
    if str(config.values.get("training_method")) == "FINE_TUNE":
        config.leave_out("lora", "training_method")
    read_length(config)
    put_t_range(config, "min_noising_strength", "max_noising_strength", 1)
    read_loss(config)
    read_concepts(config)
    if str(config.take("gradient_checkpointing", "ON")) != "OFF":
        config.put("train.gradient_checkpointing", True, "gradient_checkpointing")
    if str(config.take("ema", "OFF")) != "OFF":
        config.put("train.ema_decay", number(config.take("ema_decay", 0.999)), "ema_decay")
    if is_on(config.take("tensorboard", True)):
        config.put("tracking.report_to", ["tensorboard"], "tensorboard")
    config.ignore(WITHOUT_EFFECT)
    return config


def read_length(config: ForeignConfig) -> None:
    """Epochs become no steps, because the photos are not known here."""
    warmup = number(config.take("learning_rate_warmup_steps", 200)) or 0
    if warmup > 1:
        config.put("optimizer.lr_warmup_steps", int(warmup), "learning_rate_warmup_steps")
        if "optimizer.lr_scheduler" not in config.settings:
            config.put("optimizer.lr_scheduler", "constant_with_warmup", "learning_rate_scheduler")
    epochs = config.take("epochs", 100)
    note = f"It trains {epochs} epochs: set the steps to photos x repeats x {epochs} / batch size"
    config.put("train.max_train_steps", 800, "epochs", note)


def read_loss(config: ForeignConfig) -> None:
    weighting = str(config.take("loss_weight_fn", "CONSTANT"))
    strength = number(config.take("loss_weight_strength", 5.0))
    if weighting == "MIN_SNR_GAMMA":
        config.put("objective.snr_gamma", strength, "loss_weight_strength")
    if weighting == "DEBIASED_ESTIMATION":
        config.put("objective.debiased", True, "loss_weight_fn")


def read_concepts(config: ForeignConfig) -> None:
    """The pictures of a saved config, where it holds its concepts itself.

    Masks lie beside the pictures; what they leave out counts a tenth unless it says otherwise.
    """
    concepts = config.values.get("concepts")
    if not isinstance(concepts, list):
        return
    config.used.add("concepts")
    is_masked = is_on(config.values.get("masked_training"))
    sets = ForeignSets()
    for concept in concepts:
        if not isinstance(concept, Mapping) or not is_on(concept.get("enabled", True)):
            continue
        keys, kind = convert(concept, SET_RULES), str(concept.get("type", "STANDARD"))
        folder = keys.get("instance_data_dir")
        if "PRIOR" in kind or kind == "VALIDATION":
            key = "class_data_dir" if "PRIOR" in kind else "held_out_dir"
            sets.shared.setdefault(key, folder)
            continue
        # how captions vary is said once, by the first concept
        if not sets.learnt and isinstance(concept.get("text"), Mapping):
            read_captions(config, concept["text"])
        sets.add(keys | ({"mask_dir": folder} if is_masked else {}))
    put_sets(config, sets, SETS)
    if is_masked:
        config.ignore(["masked_training", "unmasked_probability"])
        config.put("data.mask_floor", number(config.take("unmasked_weight")), "unmasked_weight")


def read_captions(config: ForeignConfig, text: Mapping[str, Any]) -> None:
    """How the captions of a concept vary."""
    if text.get("prompt_source", "sample") == "sample":
        note = "Each line of a text file is a caption"
        config.put("data.caption_lines", "choose", "concepts.text.prompt_source", note)
    shuffles = only_if_on(text.get("enable_tag_shuffling"))
    config.put("data.shuffle_tags", shuffles, "concepts.text.enable_tag_shuffling")
    if is_on(text.get("tag_dropout_enable")):
        mode = str(text.get("tag_dropout_mode", "FULL"))
        note = "" if mode == "RANDOM" else f"Each tag alone; its mode is {mode}"
        share = positive(text.get("tag_dropout_probability"))
        config.put("data.tag_dropout", share, "concepts.text.tag_dropout_probability", note)
    put_kept_tags(config, text.get("keep_tags_count", 1), "concepts.text.keep_tags_count")
