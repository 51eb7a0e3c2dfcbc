"""The kind of adapter of another trainer's config: LoRA, LoKr or LoHa, and its layers."""

from __future__ import annotations

from typing import Any

from trainers.config.family_facts import family_facts
from trainers.config.importers.base import ForeignConfig, is_on, number, positive
from trainers.config.lora_section import MAX_RANK

# as LyCORIS, ai-toolkit, SimpleTuner and OneTrainer call them
KINDS = {"lora": "lora", "locon": "lora", "lokr": "lokr", "loha": "loha"}
CONVOLUTIONS = "conv|conv1|conv2"  # those of 3 x 3 in a U-Net


def put_kind(config: ForeignConfig, kind: Any, source: str) -> str | None:
    """Set the kind; None, and nothing is used, for one that has no equal here."""
    found = KINDS.get(str(kind).strip().lower())
    if found is None:
        return None
    config.ignore([source])
    if found != "lora":
        config.put("lora.type", found, source)
        # those trainers leave both out of LoKr and LoHa
        for key in ("lora.dropout", "lora.use_dora"):
            config.settings.pop(key, None)
    return found


def put_lokr(config: ForeignConfig, factor: str, whole: str, both: str | None = None) -> None:
    """How LoKr splits and keeps its factors; the foreign keys for each."""
    rank = config.value("lora.rank", 0)
    size = positive(config.take(factor))
    config.put("lora.decompose_factor", size and int(size), factor)
    if both is not None and is_on(config.take(both)):
        config.put("lora.decompose_both", True, both)
    is_whole = is_on(config.take(whole))
    if is_whole or rank > MAX_RANK:
        note = "So large a rank keeps the factors whole, and then alpha is left out there"
        config.put("lora.rank", MAX_RANK, whole if is_whole else "the rank", note)
        config.settings.pop("lora.alpha", None)


def is_unet(family: str | None) -> bool:
    """Whether the family's denoiser has convolutions that LoRA can be on."""
    return family is not None and family_facts(family).kohya.denoiser == "unet"


def put_convolutions(config: ForeignConfig, rank: str, alpha: str, default_alpha: Any) -> None:
    """A rank and an alpha of their own for the convolutions; the foreign keys for each."""
    own_rank = number(config.take(rank))
    own_alpha = number(config.take(alpha, default_alpha))
    config.put("lora.target_modules", "attention+mlp+conv", rank)
    if own_rank and own_rank != config.value("lora.rank"):
        config.put("lora.rank_pattern", {CONVOLUTIONS: own_rank}, rank)
    if own_alpha and own_alpha != config.value("lora.alpha"):
        config.put("lora.alpha_pattern", {CONVOLUTIONS: float(own_alpha)}, alpha)
