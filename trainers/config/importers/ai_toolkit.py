"""ai-toolkit (ostris): a YAML job with one process of type sd_trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.config.family_facts import family_named
from trainers.config.importers.adapters import is_unet, put_convolutions, put_kind, put_lokr
from trainers.config.importers.base import (
    OPTIMIZERS,
    SCHEDULES,
    ForeignConfig,
    Rule,
    choose,
    flatten,
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
from trainers.errors import UserError

DENSITIES = {"linear": "uniform", "sigmoid": "logit_normal", "lognorm_blend": "logit_normal"}

# of a prompt with settings of its own
SAMPLE_KEYS = {
    "neg": "negative_prompt",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "guidance_scale": "guidance_scale",
    "sample_steps": "num_inference_steps",
    "network_multiplier": "lora_scale",
}

RULES = [
    Rule("model.name_or_path", "model.pretrained_model_name_or_path"),
    Rule(
        "model.quantize",
        "model.quantization",
        lambda on: "int8" if is_on(on) else None,
        "It quantizes to 8 bits; nf4 takes half of that",
    ),
    Rule("network.linear", "lora.rank", number),
    Rule("network.linear_alpha", "lora.alpha", number),
    Rule("network.dropout", "lora.dropout", positive),
    Rule("datasets.mask_min_value", "data.mask_floor", positive),
    Rule("datasets.caption_dropout_rate", "data.caption_dropout", positive),
    Rule("datasets.shuffle_tokens", "data.shuffle_tags", only_if_on),
    Rule("datasets.token_dropout_rate", "data.tag_dropout", positive),
    Rule("datasets.flip_x", "data.random_flip", only_if_on),
    Rule("datasets.random_crop", "data.center_crop", lambda on: False if is_on(on) else None),
    Rule("datasets.resolution", "data.resolution", sides),
    Rule("train.min_snr_gamma", "objective.snr_gamma", positive),
    Rule("train.noise_offset", "objective.noise_offset", positive),
    Rule("train.timestep_type", "objective.density", choose(DENSITIES)),
    Rule("train.optimizer", "optimizer.name", choose(OPTIMIZERS)),
    Rule("train.lr", "optimizer.learning_rate", number),
    Rule("train.unet_lr", "optimizer.learning_rate", number),
    Rule("train.text_encoder_lr", "optimizer.text_encoder_lr", number),
    Rule("train.optimizer_params.weight_decay", "optimizer.weight_decay", number),
    Rule("train.lr_scheduler", "optimizer.lr_scheduler", choose(SCHEDULES)),
    Rule("train.lr_scheduler_params.num_warmup_steps", "optimizer.lr_warmup_steps", number),
    Rule("train.steps", "train.max_train_steps", number),
    Rule("train.batch_size", "train.train_batch_size", number),
    Rule("train.gradient_accumulation_steps", "train.gradient_accumulation_steps", number),
    Rule("train.gradient_accumulation", "train.gradient_accumulation_steps", number),
    Rule("train.gradient_checkpointing", "train.gradient_checkpointing", only_if_on),
    Rule("train.max_grad_norm", "train.max_grad_norm", positive),
    Rule("train.train_text_encoder", "train.train_text_encoder", only_if_on),
    Rule("save.save_every", "checkpoint.checkpointing_steps", number),
    Rule("save.max_step_saves_to_keep", "checkpoint.checkpoints_total_limit", positive),
    Rule("save.push_to_hub", "hub.push_to_hub", only_if_on),
    Rule("save.hf_repo_id", "hub.hub_model_id"),
    Rule("save.hf_private", "hub.private", only_if_on),
    Rule("sample.sample_every", "validation.validation_steps", number),
    Rule("sample.neg", "validation.negative_prompt"),
    Rule("sample.seed", "validation.seed", number),
    Rule("sample.guidance_scale", "validation.guidance_scale", number),
    Rule("sample.sample_steps", "validation.num_inference_steps", number),
]
PRESERVATION = "train.diff_output_preservation"
PRESERVATION_KEYS = f"{PRESERVATION}_multiplier", f"{PRESERVATION}_class"
SETS = "datasets"
# of each of them
SET_RULES = [
    Rule("folder_path", "instance_data_dir"),
    Rule("default_caption", "instance_prompt"),
    Rule("num_repeats", "repeats", times),
    Rule("mask_path", "mask_dir"),
    Rule("alpha_mask", "use_alpha_mask", only_if_on),
]
WITHOUT_EFFECT = (
    "type device name model.arch model.low_vram save.dtype "
    "datasets.caption_ext datasets.cache_latents datasets.cache_latents_to_disk train.train_unet "
    "train.noise_scheduler train.skip_first_sample train.disable_sampling sample.sampler "
    "sample.width sample.height sample.walk_seed sample.sample_start_step performance_log_every"
).split()


def is_config(tree: Mapping[str, Any]) -> bool:
    return "job" in tree and isinstance(tree.get("config"), Mapping)


def read(tree: Mapping[str, Any]) -> ForeignConfig:
    """Raises: UserError where the job is no training."""
    job = tree["config"]
    process = first(job.get("process"), "config.process")
    datasets = mappings(process.get("datasets"), "datasets")
    numbered = {f"datasets {i}": part for i, part in enumerate(datasets[1:], 2)}
    config = ForeignConfig("ai-toolkit", {**process, "datasets": datasets[0], **numbered})
    config.put("model.family", find_family(config), "model.arch")
    config.apply(RULES)
    folder = config.take("training_folder", "output")
    config.put("output_dir", f"{folder}/{job.get('name', 'lora')}", "training_folder, name")
    if not config.value("lora.alpha"):
        note = "Its default is 1; ours is the rank"
        config.put("lora.alpha", 1, "network.linear_alpha", note)
    read_network(config)
    read_prompts(config)
    read_sets(config, datasets)
    put_t_range(config, "train.min_denoising_steps", "train.max_denoising_steps", 1000)
    read_prior(config)
    kept = config.take("datasets.keep_tokens")
    put_kept_tags(config, kept, "datasets.keep_tokens")
    read_average(config)
    precision = config.take("train.dtype")
    if precision in ("bf16", "fp16"):
        config.put("train.mixed_precision", precision, "train.dtype")
    config.ignore(WITHOUT_EFFECT)
    return config


def read_network(config: ForeignConfig) -> None:
    """The kind of adapter, and its convolutions, which a transformer does not have."""
    kind = put_kind(config, config.values.get("network.type", "lora"), "network.type")
    if kind == "lokr":
        put_lokr(config, "network.lokr_factor", "network.lokr_full_rank")
    if is_unet(config.value("model.family")):
        if positive(config.values.get("network.conv")):
            put_convolutions(config, "network.conv", "network.conv_alpha", 1)
    else:
        config.ignore(["network.conv", "network.conv_alpha"])


def mappings(values: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of mappings, with one at least. Raises: UserError."""
    is_list = isinstance(values, list) and bool(values)
    if not is_list or not all(isinstance(value, Mapping) for value in values):
        raise UserError(f"{name}: a list with a mapping is expected")
    return values


def read_sets(config: ForeignConfig, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Each data set; a regularization set has the class pictures of the others."""
    sets, alike = ForeignSets(), flatten(datasets[0])
    for i, dataset in enumerate(datasets, 1):
        prefix = "datasets" if i == 1 else f"datasets {i}"
        keys = convert(dataset, SET_RULES)
        if is_on(dataset.get("is_reg")):
            found = {"class_data_dir": keys.get("instance_data_dir")}
            found["class_prompt"] = keys.get("instance_prompt")
            sets.shared |= {key: value for key, value in found.items() if value}
        else:
            sets.add(keys)
        used = [rule.theirs for rule in SET_RULES] + ["is_reg"]
        # what was said of the first set counts for all
        used += [
            key for key, value in flatten(dataset).items() if i > 1 and alike.get(key) == value
        ]
        config.ignore(f"{prefix}.{key}" for key in used)
    put_sets(config, sets, SETS)


def first(values: Any, name: str) -> Mapping[str, Any]:
    """The only mapping of a list. Raises: UserError."""
    values = mappings(values, name)
    if len(values) > 1:
        raise UserError(f"{name}: it has {len(values)} parts, and one can be imported at a time")
    return values[0]


def find_family(config: ForeignConfig) -> str | None:
    """By model.arch or, as older files have it, by a switch such as model.is_v3."""
    for name, value in config.values.items():
        if name.startswith("model.is_") and is_on(value):
            config.used.add(name)
            return family_named(name.removeprefix("model."))
    return family_named(str(config.values.get("model.arch", "sd1")))


def read_sample(config: ForeignConfig, i: int, sample: Mapping[str, Any]) -> str | dict[str, Any]:
    """A prompt, with the settings that it has of its own."""
    found = {"prompt": str(sample.get("prompt") or "")}
    for theirs, value in sample.items():
        if value is None or theirs == "prompt":
            continue
        if ours := SAMPLE_KEYS.get(theirs):
            found[ours] = str(value) if ours == "negative_prompt" else number(value)
        else:
            config.values[f"sample.samples {i}: {theirs}"] = value
    return found if len(found) > 1 else found["prompt"]


def read_prompts(config: ForeignConfig) -> None:
    """Prompts, in which [trigger] stands for the trigger word, here as there."""
    trigger = str(config.take("trigger_word") or "").strip()
    if prompts := config.take("sample.prompts"):
        config.put("validation.prompts", [str(prompt) for prompt in prompts], "sample.prompts")
    elif samples := config.take("sample.samples"):
        read = [read_sample(config, i, sample) for i, sample in enumerate(samples, 1)]
        config.put("validation.prompts", read, "sample.samples")
    if trigger:
        note = (
            "It is put before captions that lack it there; here write [trigger] in them, or set "
            "caption_prefix"
        )
        config.put("data.trigger", trigger, "trigger_word", note)
        # a data set's own caption wins
        note = "Captions beside the pictures win over it"
        config.put("data.instance_prompt", "[trigger]", "trigger_word", note)


def read_prior(config: ForeignConfig) -> None:
    """Output preservation, of one subject without class pictures; else it has no equal here."""
    values = {key: config.values.get(key) for key in (PRESERVATION, *PRESERVATION_KEYS)}
    is_on_there, weight, word = values.values()
    if is_on(is_on_there):
        if not word or config.value("data.concepts") or config.value("data.class_data_dir"):
            return
        config.put("data.prior", "output_preservation", PRESERVATION)
        note = "There it stands for the trigger in each caption; here this one prompt is kept"
        config.put("data.class_prompt", f"a photo of a {word}", PRESERVATION_KEYS[1], note)
        config.put("data.prior_loss_weight", number(weight), PRESERVATION_KEYS[0])
    config.ignore(values)


def read_average(config: ForeignConfig) -> None:
    is_used = is_on(config.take("train.ema_config.use_ema"))
    decay = number(config.take("train.ema_config.ema_decay"))
    if is_used:
        config.put("train.ema_decay", decay or 0.999, "train.ema_config.ema_decay")
