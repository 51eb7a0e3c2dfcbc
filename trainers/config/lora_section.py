"""The section `lora` of a DreamBooth config: what is trained in place of the base's own weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.config.base_sections import Section, field
from trainers.config.bounds import Fraction, Name, NameOrPath

TITLES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
MAX_RANK, MAX_ALPHA = 4096, 65_536
MAX_PATTERNS = 100

# strict: true and false are no numbers
Rank = Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)]
Alpha = Annotated[float, Field(gt=0, le=MAX_ALPHA, strict=True)]


class LoraConfig(Section):
    """The low-rank update (LoRA): its size, its layers, and how it starts."""

    type: Literal["lora", "lokr", "loha"] = field(
        "lora",
        "LoRA, or LoKr or LoHa of LyCORIS (Yeh et al. 2024): for ComfyUI, A1111 and PEFT, not for "
        "diffusers' load_lora_weights. Neither has a measurement of what it learns yet.",
    )
    rank: int = field(16, "Inner width of the low-rank update.", ge=1, le=MAX_RANK)
    alpha: float | None = field(
        None,
        "The update is scaled by alpha / rank; null means alpha = rank, in each layer its own.",
        gt=0,
        le=MAX_ALPHA,
    )
    rank_pattern: dict[Name, Rank] = field(
        {},
        "Ranks of layers of the denoiser that differ from rank, as in {to_q: 4}: the end of a "
        "name, or a regex for it; the first that fits counts. No measurement of its use yet.",
        max_length=MAX_PATTERNS,
    )
    alpha_pattern: dict[Name, Alpha] = field(
        {},
        "Alphas of layers of the denoiser, by the same patterns. No measurement of its use yet.",
        max_length=MAX_PATTERNS,
    )
    decompose_factor: Literal[-1] | Annotated[int, Field(ge=1, le=MAX_RANK)] = field(
        -1,
        "Of lokr: the smaller of the two factors that a width is split into, where it divides it; "
        "-1: the split that is nearest to a square.",
    )
    decompose_both: bool = field(
        False, "Of lokr: the smaller factor is of the rank too, and not the larger alone."
    )
    dropout: Fraction = field(0.0, "Dropout on the input of each LoRA layer.")
    target_modules: Name | Annotated[list[Name], Field(max_length=1000)] = field(
        "attention",
        "A preset (attention, attention+mlp, attention+mlp+conv of a U-Net, all-linear), a list of "
        "name endings, or one regex.",
    )
    blocks: list[Name] | None = field(
        None,
        "Only layers in these blocks, such as [transformer_blocks.3].",
        min_length=1,
        max_length=1000,
    )
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal", "pissa", "olora"] = field(
        "gaussian",
        "Initialization of lora_A; pissa (Meng et al. 2024) and olora (Buyukakyuz 2024) start A "
        "and B with a part of the base's weight, and are saved as LoRA of twice the rank for the "
        "same base. Neither has a measurement yet.",
    )
    init_from: NameOrPath | None = field(
        None,
        "Start from this LoRA: a file or PEFT folder, RUN, RUN@STEP, or USER/NAME on the Hub; null "
        "starts anew.",
    )
    use_dora: bool = field(False, "Weight-decomposed LoRA (DoRA).")
    use_rslora: bool = field(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    kohya: bool | None = field(
        None,
        "Also write the file that ComfyUI, A1111 and sd-scripts read; null: where readers need it.",
    )

    @property
    def title(self) -> str:
        """What it is called in a banner and on a card, such as LoRA of rank 4 to 16."""
        ranks = sorted({self.rank, *self.rank_pattern.values()})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        name = "DoRA" if self.use_dora else TITLES[self.type]
        return f"{name} of rank {span}"
