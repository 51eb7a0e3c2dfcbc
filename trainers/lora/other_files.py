"""What a safetensors file is that is no LoRA, and which model a LoRA is for that does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from trainers.config.family_facts import family_facts, family_names
from trainers.tensor_file import TensorInfo

# Widths of text embeddings and of denoisers, by which models of one kind differ.
OTHER_WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "SDXL"}


@cache
def known_widths() -> dict[int, str]:
    """The models that have a width, those of the supported families too."""
    widths = dict(OTHER_WIDTHS)
    for name in family_names():
        widths |= family_facts(name).widths
    return widths


@dataclass(frozen=True)
class Kind:
    """A kind of file, which one tensor's name gives away."""

    description: str
    pattern: str  # found in a name
    advice: str = ""


MERGE = "have the program that made it merge it into a whole model"

# Relatives of LoRA, whose tensors stand beside or instead of its two.
RELATIVES = (
    Kind("a LoRA with embeddings bundled in it", r"^bundle_emb\.", "save the LoRA without them"),
    Kind("an OFT or BOFT", r"\.(oft_|boft_|oft_blocks)", MERGE),
    Kind("a GLoRA (LyCORIS)", r"\.[ab][12]\.weight$", MERGE),
    Kind("an (IA)^3", r"\.on_input$|\.ia3_l$", MERGE),
    Kind("a VeRA", r"vera_lambda", MERGE),
    Kind("a LoCon with a Tucker decomposition (lora_mid)", r"\.lora_mid\.", MERGE),
    Kind(
        "a DoRA with dora_scale, whose meaning differs between programs",
        r"\.dora_scale$",
        "convert it with the program that trained it to PEFT's lora_magnitude_vector",
    ),
    Kind("a LoRA that also changes biases", r"\.lora_B\.(\w+\.)?bias$|\.diff_b$", MERGE),
    Kind("a LoRA with whole differences of weights", r"\.(diff|w_norm|b_norm)$", MERGE),
)

CONTROL_LORA = Kind("a control LoRA", r"lora_controlnet|norm\.(key|query)_norm\.scale$")

# Files without a LoRA. The order matters: a checkpoint has the names of its parts.
MODELS = (
    Kind(
        "an IP-Adapter",
        r"^(ip_adapter|image_proj)\.|to_[kv]_ip",
    ),
    Kind("a ControlNet", r"^control_model\.|controlnet_|input_hint_block|zero_convs"),
    Kind(
        "a textual inversion (an embedding of words)",
        r"^(emb_params|string_to_param.*|clip_[lgh]|t5xxl|<.*>)$",
    ),
    Kind(
        "a full checkpoint, the whole model in one file",
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
    ),
    Kind("the weights of a whole VAE", r"^(encoder|decoder)\.(conv_in|down|mid|up)"),
    Kind(
        "the weights of a whole denoiser",
        r"(down_blocks|joint_blocks|double_blocks|transformer_blocks|input_blocks)\.",
    ),
    Kind("the weights of a whole text encoder", r"^(text_model|transformer|encoder)\."),
)

MAX_EMBEDDINGS = 4  # tensors of a textual inversion, which has one for each text encoder

# Names that one model alone has: they come before those of the families, or after them.
CERTAIN_MODELS = [
    (r"lora_te3_|text_encoder_3|t5xxl|SelfAttention", "a T5 text encoder"),
    (r"add_embedding|input_blocks_[78]_|transformer_blocks[._][2-9][._]attn1", "SDXL"),
]
LIKELY_MODELS = [
    (r"transformer_blocks[._]\d+[._]attn[._]", "a multimodal transformer"),
    (r"lora_te2_|text_encoder_2", "a model with several text encoders"),
    (r"down_blocks|up_blocks|input_blocks", "a U-Net (SD1.x, SD2.x or SDXL)"),
]


@cache
def family_patterns() -> list[tuple[str, str]]:
    """Patterns of layers' names and the family that they give away."""
    families = map(family_facts, family_names())
    return [(facts.telling_names, facts.title) for facts in families if facts.telling_names]


def describe_other_file(tensors: Mapping[str, TensorInfo]) -> str:
    """What the file is, if it is no plain LoRA, and what to do; empty for a LoRA or DoRA."""
    kind = find_kind(RELATIVES, tensors)
    if kind:
        return describe(kind, tensors)
    if any("lora" in name for name in tensors):
        is_control = find_kind([CONTROL_LORA], tensors)
        return describe(CONTROL_LORA, tensors) if is_control else ""
    kind = find_kind(MODELS, tensors)
    if kind is None and is_embedding(tensors):
        kind = Kind("a textual inversion (an embedding of words)", "")
    return describe(kind or Kind("a file of other tensors", ""), tensors)


def is_embedding(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the file may be a textual inversion, whose tensors are called like its words."""
    widths = [info.shape[-1] for info in tensors.values() if 1 <= len(info.shape) <= 2]
    return len(widths) == len(tensors) <= MAX_EMBEDDINGS and set(widths) <= known_widths().keys()


def find_kind(kinds: Iterable[Kind], names: Iterable[str]) -> Kind | None:
    for kind in kinds:
        search = re.compile(kind.pattern).search
        if any(search(name) for name in names):
            return kind
    return None


def describe(kind: Kind, tensors: Mapping[str, TensorInfo]) -> str:
    names = [name for name in tensors if re.search(kind.pattern, name)]
    advice = f": {kind.advice}" if kind.advice else ""
    return (
        f"it is {kind.description}, which is not plain LoRA ({len(names)} of {len(tensors)} "
        f"tensors, for example {names[0]!r}){advice}"
    )


def guess_model(names: Iterable[str]) -> str:
    """The model that has layers of these names, or those that may; empty where nothing gives it
    away."""
    names = list(names)
    for patterns in (CERTAIN_MODELS, family_patterns(), LIKELY_MODELS):
        found = [
            model for pattern, model in patterns if any(map(re.compile(pattern).search, names))
        ]
        if found:
            # but for families, the first pattern is the surest
            return " or ".join(found) if patterns is family_patterns() else found[0]
    return ""


def describe_width(found: int, expected: int) -> str:
    """Whose width a LoRA has that does not fit the base."""
    widths = known_widths()
    guess = f" ({widths[found]}?)" if found in widths else ""
    return f"this LoRA is for a model of width {found}{guess}, the base has {expected}"
