"""The names in files of diffusers before 0.26, whose attention processors held the LoRA."""

from __future__ import annotations

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.update import Rows
from trainers.original.layout import TEXT_LEVEL

# What they called the parts of an attention layer of CLIP.
TEXT_NAMES = {
    ".self_attn.q_proj": ".self_attn.to_q",
    ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v",
    ".self_attn.out_proj": ".self_attn.to_out",
}


def layer_names(family: Family) -> dict[str, Rows]:
    """The names that only such files have."""
    names = {}
    for layer in adaptable_layers(family):
        component, _, rest = layer.partition(".")
        rows = Rows((layer,))
        if component == family.denoiser_name:
            attention, found, part = rest.rpartition(".to_")
            # a layer like to_q of an attention: the last name, or the one before a number
            if found and part in ("q", "k", "v", "out.0"):
                part = part.removesuffix(".0")
                for name in (f"{attention}.processor.to_{part}", f"{attention}.to_{part}"):
                    if name != rest:
                        names |= {name: rows, f"{component}.{name}": rows}
            continue
        for own, old in TEXT_NAMES.items():
            if rest.endswith(own):
                name = rest.removesuffix(own) + old
                names[f"{component}.{name}"] = rows
                names[f"{component}.{name.removeprefix(TEXT_LEVEL)}"] = rows
    return names
