"""The weights of a component, from a file in the release's layout to files of diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.errors import UserError
from trainers.original.checkpoint import Checkpoint
from trainers.original.layout import (
    SHARED,
    TEXT_LEVEL,
    TIED,
    OriginalTensor,
    component_tensors,
)
from trainers.tensor_file import open_safetensors

MAX_SHARD = 4 * 2**30  # bytes of a file of weights, about; as much is in memory at a time
# names of weights, which are no settings, and of their tables
WEIGHT_NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PROJECTION = "text_projection.weight"  # of CLIP; a file without it means that nothing is projected


def write_component(
    checkpoint: Checkpoint, component: str, kind: Sequence[str], folder: Path
) -> set[str]:
    """Write the weights of a component; returns the names of the tensors that it is made of."""
    shapes = component_shapes(folder, component, kind)
    wanted = component_tensors(component, shapes, checkpoint.facts)
    missing = [one.name for one in wanted if one.name not in checkpoint.names]
    missing = [name for name in missing if not name.endswith(PROJECTION)]
    if missing:
        raise UserError(
            f"{checkpoint.path}: {len(missing)} of {len(wanted)} tensors of the {component} are "
            f"not in it, for example {', '.join(missing[:3])}: it is not whole, or model.config "
            "has the settings of another model"
        )
    stem, files = WEIGHT_NAMES[kind[0]], shards(wanted, shapes)
    table = {}
    for number, part in enumerate(files, 1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        name = f"{stem}{suffix}.safetensors"
        state = read_tensors(checkpoint, part, shapes)
        save_file(state, folder / component / name, {"format": "pt"})
        table |= dict.fromkeys(state, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": table}
        path = folder / component / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return {one.name for one in wanted}


def component_shapes(folder: Path, component: str, kind: Sequence[str]) -> dict[str, torch.Size]:
    """The shapes of a component's tensors, by the names that files on the Hub have.

    Raises: UserError where its config is not there, or is none.
    """
    try:
        state = meta_model(folder, component, kind).state_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.config: {component}/config.json of the settings cannot be read ({error}): "
            "fetch them again"
        ) from error
    has_level = any(key.startswith(TEXT_LEVEL) for key in state)
    level = "" if kind[1] != "CLIPTextModel" or has_level else TEXT_LEVEL
    return {level + key: tensor.shape for key, tensor in state.items()}


def meta_model(folder: Path, component: str, kind: Sequence[str]) -> nn.Module:
    """A component without weights; kind: its library and class."""
    library, name = kind
    with torch.device("meta"):
        if library == "diffusers":
            model_class = getattr(diffusers, name)
            return model_class.from_config(model_class.load_config(folder, subfolder=component))
        model_class = getattr(transformers, name)
        config = model_class.config_class.from_pretrained(folder, subfolder=component)
        return model_class(config)


def missing_tensors(model: PreTrainedModel, found: Iterable[str]) -> list[str]:
    """The tensors of a text encoder that its files, which have `found`, lack.

    Files may leave out a tensor that is another one's, and have a level of names that the model
    lacks, or lack one.
    """
    levels = (TEXT_LEVEL, f"{model.base_model_prefix}.")

    def bare(name: str) -> str:
        return next((name.removeprefix(one) for one in levels if name.startswith(one)), name)

    known = set(map(bare, found))
    for one, other in {TIED: SHARED, **model.all_tied_weights_keys}.items():
        pair = {bare(one), bare(other)}
        known |= pair if pair & known else set()
    return [name for name in model.state_dict() if bare(name) not in known]


def shards(
    wanted: Sequence[OriginalTensor], shapes: dict[str, torch.Size]
) -> list[list[OriginalTensor]]:
    """The tensors in order, in files of about MAX_SHARD bytes of float32."""
    files: list[list[OriginalTensor]] = [[]]
    size = 0
    for one in wanted:
        own = sum(4 * shapes[part].numel() for part in one.parts)
        if files[-1] and size + own > MAX_SHARD:
            files.append([])
            size = 0
        files[-1].append(one)
        size += own
    return files


def read_tensors(
    checkpoint: Checkpoint, wanted: Sequence[OriginalTensor], shapes: dict[str, torch.Size]
) -> dict[str, Tensor]:
    """Tensors of diffusers by their names. Raises: UserError for other shapes."""
    state = {}
    with open_safetensors(checkpoint.path) as opened:
        for one in wanted:
            sizes = [shapes[part] for part in one.parts]
            if one.name not in checkpoint.names:
                state[one.parts[0]] = torch.eye(*sizes[0])
                continue
            whole = opened.get_tensor(checkpoint.names[one.name])
            # bfloat16 holds each number of 8 bits exactly
            if whole.is_floating_point() and whole.itemsize == 1:
                whole = whole.bfloat16()
            parts = one.split(whole, sizes)
            if parts is None:
                expected = [list(size) for size in sizes]
                raise UserError(
                    f"{checkpoint.path}: {one.name} has the shape {list(whole.shape)}, and there "
                    f"the model has {expected}: model.config has the settings of another model"
                )
            # rows of one tensor share its memory, which a file cannot
            state |= {name: part.clone() for name, part in zip(one.parts, parts, strict=True)}
    return state
