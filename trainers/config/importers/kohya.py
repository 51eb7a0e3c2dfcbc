"""sd-scripts (kohya): the TOML of `--config_file`, as its GUI saves it too."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.config.base_sections import OPTIMIZER_KEYS
from trainers.config.family_facts import (
    default_family,
    families_with,
    family_facts,
    family_named,
    family_names,
)
from trainers.config.importers.adapters import (
    is_unet,
    put_convolutions,
    put_kind,
    put_lokr,
)
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
from trainers.config.importers.objective import put_coarse_noise, put_loss, put_t_range
from trainers.config.importers.photo_sets import ForeignSets, convert, put_sets

LYCORIS = "lycoris.kohya"
# modules that train the text encoder of a U-Net too unless they are told not to
WITH_TEXT_ENCODER = ("networks.lora", "networks.lokr", "networks.loha", LYCORIS)
LYCORIS_PRESETS = {
    "full": "attention+mlp+conv",
    "full-lin": "attention+mlp",
    "attn-mlp": "attention+mlp",
    "attn-only": "attention",
}
DENSITIES = {"uniform": "uniform", "sigmoid": "logit_normal", "shift": "logit_normal"}
SHORT_PROMPT = 75  # tokens of CLIP, without the marks of beginning and end

RULES = [
    *SHARED_RULES,
    Rule(
        "pretrained_model_name_or_path",
        "model.pretrained_model_name_or_path",
        note="A .safetensors file, a folder in diffusers' layout or a name on the Hub",
    ),
    Rule("t5xxl_max_token_length", "model.max_sequence_length", number),
    Rule("guidance_scale", "model.guidance_scale", number),
    Rule("fp8_base", "model.quantization", lambda on: "fp8" if is_on(on) else None),
    Rule("blocks_to_swap", "model.offload", lambda blocks: True if positive(blocks) else None),
    Rule("network_dim", "lora.rank", number),
    Rule("network_dropout", "lora.dropout", positive),
    Rule(
        "train_data_dir",
        "data.instance_data_dir",
        note="The folder that holds the pictures, not the one above 10_name",
    ),
    Rule("reg_data_dir", "data.class_data_dir", note="Set data.class_prompt too"),
    Rule("prior_loss_weight", "data.prior_loss_weight", number),
    Rule("flip_aug", "data.random_flip", only_if_on),
    Rule("random_crop", "data.center_crop", lambda on: False if is_on(on) else None),
    Rule("conditioning_data_dir", "data.mask_dir"),
    Rule("alpha_mask", "data.use_alpha_mask", only_if_on),
    Rule("enable_bucket", "data.buckets", is_on),
    Rule("bucket_no_upscale", "data.max_upscale", lambda on: 1.0 if is_on(on) else None),
    Rule("caption_dropout_rate", "data.caption_dropout", positive),
    Rule("caption_prefix", "data.caption_prefix", lambda text: text or None),
    Rule("caption_suffix", "data.caption_suffix", lambda text: text or None),
    Rule("shuffle_caption", "data.shuffle_tags", only_if_on),
    Rule("caption_tag_dropout_rate", "data.tag_dropout", positive),
    Rule(
        "enable_wildcard",
        "data.caption_lines",
        lambda on: "choose" if is_on(on) else None,
        "Each line is a caption; choices in braces are left as they are",
    ),
    Rule("min_snr_gamma", "objective.snr_gamma", positive),
    Rule("debiased_estimation_loss", "objective.debiased", only_if_on),
    Rule("noise_offset", "objective.noise_offset", positive),
    Rule("ip_noise_gamma", "objective.input_perturbation", positive),
    Rule("discrete_flow_shift", "objective.shift", number),
    Rule("timestep_sampling", "objective.density", choose(DENSITIES)),
    Rule("optimizer_type", "optimizer.name", choose(OPTIMIZERS)),
    Rule("unet_lr", "optimizer.learning_rate", number),
    Rule("lr_scheduler_num_cycles", "optimizer.lr_num_cycles", number),
    Rule("lr_scheduler_power", "optimizer.lr_power", number),
    Rule("save_every_n_steps", "checkpoint.checkpointing_steps", number),
    Rule("sample_every_n_steps", "validation.validation_steps", number),
    Rule("log_with", "tracking.report_to", choose(TRACKERS)),
    Rule("huggingface_repo_id", "hub.hub_model_id"),
]
SETS = "datasets.subsets"
# of each of them
SET_RULES = [
    Rule("image_dir", "instance_data_dir"),
    Rule("class_tokens", "instance_prompt"),
    Rule("num_repeats", "repeats", times),
    Rule("conditioning_data_dir", "mask_dir"),
    Rule("alpha_mask", "use_alpha_mask", only_if_on),
]
# how the files are written, loaded and moved, which is settled here
WITHOUT_EFFECT = (
    "sdpa xformers mem_eff_attn cache_latents cache_latents_to_disk cache_text_encoder_outputs "
    "cache_text_encoder_outputs_to_disk save_model_as save_precision max_data_loader_n_workers "
    "persistent_data_loader_workers logging_dir caption_extension network_module lowram highvram "
    "no_half_vae ae clip_l clip_g t5xxl full_bf16 full_fp16 vae_batch_size model_prediction_type"
).split()


def is_config(tree: Mapping[str, Any]) -> bool:
    names = ForeignConfig("", tree).values
    known = {rule.theirs for rule in RULES} | set(WITHOUT_EFFECT)
    has_subsets = any(isinstance(part, Mapping) and "subsets" in part for part in datasets(tree))
    return has_subsets or len({name.rpartition(".")[2] for name in names} & known) >= 3


def datasets(tree: Mapping[str, Any]) -> list[Any]:
    """The parts of [[datasets]], which a file of --dataset_config has."""
    found = tree.get("datasets")
    return found if isinstance(found, list) else []


def read(tree: Mapping[str, Any]) -> ForeignConfig:
    # sections of the file are for its readers only
    flat = ForeignConfig("", tree).values
    config = ForeignConfig(
        "sd-scripts", {name.rpartition(".")[2]: value for name, value in flat.items()}
    )
    module = str(config.values.get("network_module", "networks.lora"))
    family = read_family(config, module)
    config.apply(RULES)
    folder, name = config.take("output_dir", "output"), config.take("output_name", "last")
    config.put("output_dir", f"{folder}/{name}", "output_dir, output_name")
    alpha = number(config.take("network_alpha", 1))
    note = "" if "network_alpha" in config.values else "Its default is 1; ours is the rank"
    config.put("lora.alpha", alpha, "network_alpha", note)
    unet_only = is_on(config.take("network_train_unet_only"))
    if module in WITH_TEXT_ENCODER and not unet_only:
        config.put("train.train_text_encoder", True, "network_train_unet_only (off)")
    else:
        config.settings.pop("optimizer.text_encoder_lr", None)
    read_network(config, module, family)
    read_length(config)
    read_optimizer_arguments(config)
    put_t_range(config, "min_timestep", "max_timestep", 1000)
    put_loss(config)
    put_coarse_noise(config)
    read_subsets(config, datasets(tree))
    note = "Theirs counts tags of the prefix too" if config.value("data.caption_prefix") else ""
    put_kept_tags(config, config.take("keep_tokens"), "keep_tokens", note)
    if family in families_with("model", "clip_chunks"):
        tokens = number(config.take("max_token_length", SHORT_PROMPT)) or SHORT_PROMPT
        chunks = tokens // SHORT_PROMPT
        config.put("model.clip_chunks", chunks if chunks > 1 else None, "max_token_length")
    precision = config.take("mixed_precision")
    if precision in ("bf16", "fp16", "no"):
        config.put("train.mixed_precision", precision, "mixed_precision")
    if config.value("hub.hub_model_id"):
        config.put("hub.push_to_hub", True, "huggingface_repo_id")
    config.ignore(WITHOUT_EFFECT)
    return config


def read_family(config: ForeignConfig, module: str) -> str | None:
    """By a switch that is called like a family, else by the network's module.

    Some families have one module: their scripts differ, which no config tells.
    """
    switches = [
        name for name, value in config.values.items() if is_on(value) and family_named(name)
    ]
    if switches:
        config.ignore(switches)
        family = family_named(switches[0])
        config.put("model.family", family, switches[0])
        return family
    if module in (LYCORIS, "networks.lokr", "networks.loha"):
        family = default_family()
        config.put("model.family", family, "network_module", "It is for all: is it this one?")
        return family
    family, facts = family_named(module), map(family_facts, family_names())
    titles = [own.title for own in facts if own.kohya.network_module == module]
    note = f"It is that of {' and '.join(titles)}: is it this one?" if len(titles) > 1 else ""
    config.put("model.family", family, "network_module", note)
    return family


def read_network(config: ForeignConfig, module: str, family: str | None) -> None:
    """The kind of adapter and what network_args say, each of which is a key of its own."""
    arguments = config.take("network_args") or []
    for item in arguments.split() if isinstance(arguments, str) else arguments:
        key, _, value = str(item).partition("=")
        config.values[f"network_args.{key.strip()}"] = value.strip().strip("\"'")
    named = module.rpartition(".")[2]
    kind = put_kind(config, named if named in ("lokr", "loha") else "lora", "network_module")
    if module == LYCORIS:
        kind = put_kind(config, config.values.get("network_args.algo", "lora"), "network_args.algo")
    if kind == "lokr":
        keys = (f"network_args.{key}" for key in ("factor", "full_matrix", "decompose_both"))
        put_lokr(config, *keys)
    for key in ("network_args.loraplus_unet_lr_ratio", "network_args.loraplus_lr_ratio"):
        config.put("optimizer.lora_plus_ratio", positive(config.take(key)), key)
    preset = LYCORIS_PRESETS.get(str(config.values.get("network_args.preset", "full")))
    has_convolutions = positive(config.values.get("network_args.conv_dim")) is not None
    if module == LYCORIS:
        has_convolutions = preset == LYCORIS_PRESETS["full"]
    if has_convolutions and is_unet(family):
        # LyCORIS has the alpha of all where it is not told
        default = config.value("lora.alpha") if module == LYCORIS else 1
        keys = "network_args.conv_dim", "network_args.conv_alpha"
        put_convolutions(config, *keys, default)
    elif module == LYCORIS and preset:
        config.put("lora.target_modules", preset.removesuffix("+conv"), "network_args.preset")
    config.ignore(["network_args.preset"] if preset else [])


def read_length(config: ForeignConfig) -> None:
    """Steps and warm-up, which may be a share of the steps."""
    steps = number(config.take("max_train_steps", 1600))
    config.put("train.max_train_steps", steps, "max_train_steps")
    warmup = number(config.take("lr_warmup_steps")) or 0
    if 0 < warmup < 1:
        config.put("optimizer.lr_warmup_steps", round(warmup * steps), "lr_warmup_steps")
    elif warmup:
        config.put("optimizer.lr_warmup_steps", int(warmup), "lr_warmup_steps")


def read_optimizer_arguments(config: ForeignConfig) -> None:
    """`optimizer_args`, a list of name=value, of an optimizer that is known here."""
    optimizer, given = config.value("optimizer.name"), config.values.get("optimizer_args")
    if optimizer is None or not isinstance(given, list):
        return
    config.used.add("optimizer_args")
    others = {}
    for name, _, text in (str(argument).partition("=") for argument in given):
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        value = list(value) if isinstance(value, tuple) else value
        if name in OPTIMIZER_KEYS[optimizer]:
            config.put(f"optimizer.{name}", value, "optimizer_args")
        else:
            others[name] = value
    config.put("optimizer.arguments", others or None, "optimizer_args")


def read_subsets(config: ForeignConfig, parts: Sequence[Any]) -> None:
    """Every subset of every data set; a regularization set has the class pictures of the others."""
    sets, left = ForeignSets(), {}
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        for i, subset in enumerate(part.get("subsets") or [], 1):
            keys = convert(subset, SET_RULES)
            if is_on(subset.get("is_reg")):
                found = {"class_data_dir": keys.get("instance_data_dir")}
                found["class_prompt"] = keys.get("instance_prompt")
                sets.shared |= {key: value for key, value in found.items() if value}
            else:
                sets.add(keys)
            known = {rule.theirs for rule in SET_RULES} | {"is_reg", "caption_extension"}
            left |= {f"subset {i}: {key}": subset[key] for key in subset.keys() - known}
        size = sides(part.get("resolution"))
        if size and "data.resolution" not in config.settings:
            config.put("data.resolution", size, "datasets.resolution")
    config.ignore(["datasets"])
    config.values |= left
    put_sets(config, sets, SETS)
    if config.value("data.mask_dir") or any("mask_dir" in keys for keys in sets.learnt):
        config.put("data.mask_floor", 0.0, "masked_loss", "It leaves out what a mask does")
        config.ignore(["masked_loss"])
