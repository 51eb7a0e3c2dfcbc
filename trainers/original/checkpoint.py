"""A model in one file: which family it is of, which parts it has, and which it lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainers.config.family_facts import FamilyFacts, family_facts, family_names
from trainers.errors import UserError
from trainers.tensor_file import TensorInfo, read_header

VAE_PREFIXES = ("first_stage_model.", "vae.")

# What programs leave in such files beside the weights that are used: averages of the training, its
# schedule, and numbers that are the same in each model.
IDLE = re.compile(
    r"model_ema\.|.*position_ids$|.*logit_scale$|.*encoder\.embed_tokens\.weight$"
    r"|(sqrt_|log_one_minus_)?(betas|(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?)$"
    r"|posterior_\w+$|denoiser\.sigmas$|v_pred$|ztsnr$|.*attn_mask$|first_stage_model\.loss\."
)
# Weights that are no numbers of their own, by names that stand beside them.
QUANTIZED = re.compile(r"scale_weight$|weight_scale$|scaled_fp8$|comfy_quant$|absmax$")

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors by which a U-Net says how it was trained


@dataclass(frozen=True)
class Checkpoint:
    """The header of a file; `names` are those of the family's layout, with the file's own."""

    path: Path
    facts: FamilyFacts
    names: dict[str, str]
    tensors: dict[str, TensorInfo]

    def has(self, component: str) -> bool:
        """Whether the file has a component of the pipeline."""
        single = self.facts.single_file
        if component == "vae":
            prefix = single.vae
        elif component == self.facts.kohya.denoiser:
            return True
        elif component in single.text_encoders:
            prefix = single.text_encoders[component].prefix
        else:
            return False
        return any(name.startswith(prefix) for name in self.names)


def find_family(tensors: dict[str, TensorInfo]) -> str | None:
    """The family that a file's tensors are of, by the one that no other has."""
    for name in family_names():
        single = family_facts(name).single_file
        if single and {single.mark, single.denoiser + single.mark} & tensors.keys():
            return name
    return None


def read_checkpoint(path: Path) -> tuple[str, Checkpoint]:
    """The family of a file, and its header. Raises: UserError for what cannot be a base."""
    tensors = read_header(path).tensors
    family = find_family(tensors)
    if any(QUANTIZED.search(name) for name in tensors):
        raise UserError(
            f"{path}: its weights are quantized, with scales beside them: take the file whose "
            "weights have 16 or 32 bits, and set model.quantization to train on fewer"
        )
    if family is None or any(".lora_" in name for name in tensors):
        what = "a LoRA, for which there is lora.init_from" if is_lora(tensors) else "none of these"
        families = [family_facts(name) for name in family_names()]
        titles = ", ".join(facts.title for facts in families if facts.single_file)
        raise UserError(
            f"{path}: a base is a model of one of the families {titles}, with all its layers. This "
            f"file is {what}"
        )
    if "edm_mean" in tensors:
        raise UserError(
            f"{path}: this base was trained with other noise levels (EDM), which cannot be "
            "trained here"
        )
    facts = family_facts(family)
    return family, Checkpoint(path, facts, canonical_names(tensors, facts), tensors)


def is_lora(tensors: dict[str, TensorInfo]) -> bool:
    return any("lora" in name for name in tensors)


def canonical_names(tensors: dict[str, TensorInfo], facts: FamilyFacts) -> dict[str, str]:
    """The names as the family's layout has them, with the file's own.

    A file of a denoiser alone may leave its prefix out, and the autoencoder has either of two.
    """
    single, names = facts.single_file, {}
    is_bare = single.mark in tensors
    for name in tensors:
        canonical = single.denoiser + name if is_bare else name
        for prefix in VAE_PREFIXES:
            if name.startswith(prefix):
                canonical = single.vae + name.removeprefix(prefix)
        names[canonical] = name
    return names
