"""The files of a run that other programs load: LoRA with its scale folded in, or a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.atomic import replacing_folder, working_folder
from trainers.config import DreamBoothConfig
from trainers.families import Family
from trainers.lora.base_layers import text_prefix
from trainers.lora.formats import load_format
from trainers.lora.lycoris_layers import read_layers
from trainers.lora.names import base_architecture
from trainers.lora.peft_config import rank_settings
from trainers.lora.peft_format import from_peft
from trainers.lora.started import StartedLinear
from trainers.publishing.model_card import package_versions
from trainers.publishing.public import PRIVATE_SECTIONS, public_config
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME
from trainers.tensor_file import read_header

# where the libraries note what a model or tokenizer was loaded from
ORIGIN_KEYS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}


def lora_state(module: nn.Module, prefix: str = "", adapter: str = "default") -> dict[str, Tensor]:
    """LoRA tensors by PEFT name, float32, with the scale folded into lora_B so that alpha = rank.

    Programs disagree about where alpha is written; a file whose scale is one is right for all of
    them.
    """
    layers = dict(module.named_modules())
    state = {}
    for name, tensor in get_peft_model_state_dict(module, adapter_name=adapter).items():
        layer_name, _, half = name.partition(".lora_")
        layer = layers[layer_name]
        if isinstance(layer, StartedLinear):
            tensor = layer.small_factors(adapter)["AB".index(half[0])]
        tensor = tensor.detach().float()
        if half.startswith("B"):
            tensor = tensor * layer.scaling[adapter]
        state[prefix + name] = tensor.cpu().contiguous()
    return state


def lora_metadata(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> dict:
    """The PEFT config that fits a module's `lora_state`."""
    config = module.peft_config["default"].to_dict() | {"use_rslora": False}
    ranks = {}
    for name, tensor in state.items():
        layer_name, _, is_a = name.removeprefix(prefix).partition(".lora_A.")
        if is_a:
            ranks[layer_name] = len(tensor)
    config |= rank_settings(ranks)
    # diffusers leaves freshly loaded LoRA layers in training mode, where dropout would act
    config["lora_dropout"] = 0.0
    # it may be a path on this machine, and diffusers does not read it
    config["base_model_name_or_path"] = None
    for key, value in config.items():
        # sets have no order and no JSON
        if isinstance(value, set):
            config[key] = sorted(value)
    return config


def save_lora(
    family: Family, text_encoders: Sequence[str], folder: Path, config: DreamBoothConfig
) -> None:
    """Write pytorch_lora_weights.safetensors, and kohya's file if the config says so.

    Each is written aside first and then renamed, so that no half of a file is ever found.
    """
    metadata = make_metadata(config, base_architecture(family))
    if config.lora.type != "lora":
        with working_folder(folder) as temporary:
            file = temporary / WEIGHT_NAME
            updates = read_layers(family, text_encoders)
            load_format("kohya").write(updates, family, file, metadata)
            file.replace(folder / WEIGHT_NAME)
        return
    packed, state = {}, {}
    for name in (family.denoiser_name, *text_encoders):
        module = getattr(family.pipe, name)
        prefix = text_prefix(module)
        own = lora_state(module, prefix)
        packed[f"{name}_lora_layers"] = own
        packed[f"{name}_lora_adapter_metadata"] = lora_metadata(module, own, prefix)
        state |= {f"{name}.{key}": value for key, value in own.items()}
    with working_folder(folder) as temporary:
        file = temporary / WEIGHT_NAME
        family.pipeline.save_lora_weights(temporary, **packed)
        # diffusers writes its own header alone; ours is added to it
        save_file(load_file(file), file, read_header(file).metadata | metadata)
        file.replace(folder / WEIGHT_NAME)
        if config.writes_kohya:
            file = temporary / KOHYA_NAME
            load_format("kohya").write(from_peft(state), family, file, metadata)
            file.replace(folder / KOHYA_NAME)


def make_metadata(config: DreamBoothConfig, architecture: str) -> dict[str, str]:
    """What a LoRA file says of itself.

    That is modelspec's keys (Stability AI, 1.0.1), and the config and versions to repeat the run.
    architecture: modelspec's id of the base model.
    """
    size, shared = config.data.max_resolution, public_config(config)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": shared.output_dir.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": date.today().isoformat(),
        "modelspec.trigger_phrase": ", ".join(config.data.triggers or config.data.instance_prompts),
        "diffusion_trainers.config": shared.model_dump_json(exclude=set(PRIVATE_SECTIONS)),
        "diffusion_trainers.versions": json.dumps(package_versions()),
    }


def save_pipeline(family: Family, text_encoders: Sequence[str], folder: Path) -> None:
    """The whole pipeline with the trained weights, in the diffusers layout."""
    trained = {name: getattr(family.pipe, name) for name in (family.denoiser_name, *text_encoders)}
    pipe = family.pipeline.from_pretrained(
        family.folder, variant=family.variant, use_safetensors=True, **trained
    )
    with replacing_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
        remove_origin(temporary)


def remove_origin(folder: Path) -> None:
    """Remove from a saved pipeline's configs where its parts were loaded from: a path, often."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and ORIGIN_KEYS & content.keys():
            kept = {key: value for key, value in content.items() if key not in ORIGIN_KEYS}
            path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
