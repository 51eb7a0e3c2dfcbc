"""A pipeline with random weights on disk, of which one shard at a time is in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmark.bases import make_parts
from benchmark.sizes import Size
from reference.models import PIPELINES
from trainers.lora.base_layers import text_prefix

DTYPE = torch.bfloat16
SHARD_BYTES = 2**31
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"


def meta_parts(family: str, size: Size) -> dict[str, object]:
    """The components of a pipeline, its models without weights."""
    with torch.device("meta"):
        return make_parts(family, size)


def models_of(parts: dict[str, object]) -> dict[str, nn.Module]:
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def bytes_on_disk(parts: dict[str, object]) -> int:
    """The bytes of all weights that `write_base` writes."""
    tensors = (stored_tensors(model).values() for model in models_of(parts).values())
    return sum(sum(tensor.numel() for tensor in own) for own in tensors) * DTYPE.itemsize


def write_base(
    family: str, parts: dict[str, object], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the folder of a pipeline as it is released, by the components of `meta_parts`."""
    PIPELINES[family](**parts).save_config(folder)
    models = models_of(parts)
    generator = torch.Generator().manual_seed(0)
    for name, part in parts.items():
        if name in models:
            write_model(models[name], folder / name, generator, shard_bytes)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)


def write_model(
    model: nn.Module, folder: Path, generator: torch.Generator, shard_bytes: int
) -> None:
    """Write the config and the weights of one component, in several files where they are large."""
    is_of_transformers = isinstance(model, PreTrainedModel)
    if is_of_transformers:
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    file_name = TRANSFORMERS_WEIGHTS_NAME if is_of_transformers else SAFETENSORS_WEIGHTS_NAME
    stem = file_name.removesuffix(".safetensors")
    tensors = stored_tensors(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard_bytes
    )
    for shard_name, keys in split.filename_to_tensors.items():
        shard = {key: draw_weights(key, tensors[key].shape, generator) for key in keys}
        save_file(shard, folder / shard_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{file_name}.index.json").write_text(json.dumps(index))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What files hold of a model, by the names in released files; a shared weight once."""
    shared_once = dict(model.named_parameters()) | dict(model.named_buffers())
    prefix = text_prefix(model)
    state = model.to(DTYPE).state_dict()
    return {prefix + key: tensor for key, tensor in state.items() if key in shared_once}


def draw_weights(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights that keep the scale of what passes through: norms of one, no biases."""
    if len(shape) < 2:
        return torch.full(shape, float(key.endswith("weight")), dtype=DTYPE)
    deviation = shape[1:].numel() ** -0.5
    return torch.empty(shape, dtype=DTYPE).normal_(0.0, deviation, generator=generator)
