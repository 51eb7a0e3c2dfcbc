"""The names of ComfyUI, ai-toolkit and Black Forest Labs: those of a model's first release."""

from __future__ import annotations

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import diffusers_rows, released_rows, text_encoder_layers
from trainers.lora.update import Rows

# Before the denoiser's names: ComfyUI and ai-toolkit, PEFT on the released model, nothing.
PREFIXES = ("diffusion_model.", "base_model.model.", "")

# ComfyUI's names of the CLIP text encoders of any model, in their order.
CLIP_NAMES = ("clip_l", "clip_g")


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in such files."""
    layers = adaptable_layers(family)
    names = {}
    facts = family.facts.kohya
    # of some models ComfyUI and ai-toolkit have diffusers' names behind these prefixes too
    all_rows = diffusers_rows(layers, facts.denoiser) | released_rows(layers, facts)
    for layer, rows in all_rows.items():
        names |= {prefix + layer: rows for prefix in PREFIXES}
    encoders = text_encoder_layers(family, layers)
    for clip, (encoder, own) in zip(CLIP_NAMES, encoders.items(), strict=False):
        for layer in own:
            names[f"text_encoders.{clip}.transformer.{layer}"] = Rows((f"{encoder}.{layer}",))
    return names
