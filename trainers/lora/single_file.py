"""A whole pipeline as one file in the layout of its first release, which ComfyUI and A1111 load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import text_prefix
from trainers.original.checkpoint import V_PREDICTION, ZERO_SNR
from trainers.original.layout import component_tensors
from trainers.tensor_file import write_tensors


def save_single_file(family: Family, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the pipeline that the family holds, with all its parts.

    metadata: what the header says. Raises: UserError for a family without such a layout.
    """
    if family.facts.single_file is None:
        raise UserError(f"{family.facts.title} has no layout of one file here: use --format merged")
    state = scheduler_marks(family)
    for part in (family.denoiser_name, "vae", *family.text_encoder_names):
        state |= original_state(family, part)
    write_tensors(state, path, metadata)


def original_state(family: Family, part: str) -> dict[str, Tensor]:
    """The tensors of a loaded component, by the release's names."""
    module = getattr(family.pipe, part)
    level = text_prefix(module)
    own = {level + key: tensor.detach() for key, tensor in module.state_dict().items()}
    state = {}
    for tensor in component_tensors(part, own, family.facts):
        # a copy, because two names may be of one memory
        state[tensor.name] = tensor.join([own[key] for key in tensor.parts]).cpu().clone()
    return state


def scheduler_marks(family: Family) -> dict[str, Tensor]:
    """Empty tensors by which ComfyUI knows that a U-Net predicts v, and from pure noise on."""
    config = family.pipe.scheduler.config
    marks = {}
    if config.get("prediction_type") == "v_prediction":
        marks[V_PREDICTION] = torch.zeros(0)
        if config.get("rescale_betas_zero_snr"):
            marks[ZERO_SNR] = torch.zeros(0)
    return marks
