"""LoRA in the words of other programs: what diffusers, PEFT and kohya's family of readers call each
layer.

Kohya's names (sd-scripts, A1111, ComfyUI) for SD3 and Flux.1 are those of the models' first
release, where one layer may hold several of diffusers' as its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from trainers.errors import UserError
from trainers.lora.update import Layers, Lora, LoraUpdate, split_update, stack_updates


def released_layers(
    released: str, names: str, part: str, rows: Sequence[str]
) -> dict[str, list[str]]:
    """Each of the released names to the layers that are its rows."""
    pairs = zip(names.split(), rows, strict=True)
    return {released + name: [part + row for row in parts.split()] for name, parts in pairs}


JOINT = (
    "attn.to_q attn.to_k attn.to_v",
    "attn.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
)


CONTEXT = (
    *("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.to_add_out"),
    *("ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear"),
)


BLOCK, SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."


SD3, FLUX = (
    "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1",
    "attn.qkv attn.proj mlp.0 mlp.2 mod.lin",
)


ENDS, LAST = "final_layer.linear final_layer.adaLN_modulation.1", ("proj_out", "norm_out.linear")


TIME, POOLED, GUIDANCE = (
    f"time_text_embed.{kind}_embedder.linear_" for kind in ("timestep", "text", "guidance")
)


RELEASED_LAYERS: dict[
    str, dict[str, list[str]]
] = {  # a layer as released: diffusers' layers that are its rows
    "sd15": {},
    "sd3": {
        **released_layers("joint_blocks.{}.x_block.", SD3, BLOCK, JOINT),
        **released_layers("joint_blocks.{}.context_block.", SD3, BLOCK, CONTEXT),
        **released_layers(
            "joint_blocks.{}.x_block.attn2.",
            "qkv proj",
            BLOCK + "attn2.",
            ("to_q to_k to_v", "to_out.0"),
        ),
        **released_layers("t_embedder.mlp.", "0 2", TIME, "12"),
        **released_layers("y_embedder.mlp.", "0 2", POOLED, "12"),
        **released_layers("", f"x_embedder.proj {ENDS}", "", ("pos_embed.proj", *LAST)),
    },
    "flux": {
        **released_layers("double_blocks.{}.img_", FLUX, BLOCK, JOINT),
        **released_layers("double_blocks.{}.txt_", FLUX, BLOCK, CONTEXT),
        **released_layers(
            "single_blocks.{}.linear",
            "1 2",
            SINGLE,
            ("attn.to_q attn.to_k attn.to_v proj_mlp", "proj_out"),
        ),
        **released_layers("single_blocks.{}.", "modulation.lin", SINGLE, ("norm.linear",)),
        **released_layers("time_in.", "in_layer out_layer", TIME, "12"),
        **released_layers("vector_in.", "in_layer out_layer", POOLED, "12"),
        **released_layers("guidance_in.", "in_layer out_layer", GUIDANCE, "12"),
        **released_layers(
            "", f"img_in txt_in {ENDS}", "", ("x_embedder", "context_embedder", *LAST)
        ),
    },
}


KOHYA_PREFIXES = {  # components to the beginnings of their names
    "sd15": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd3": {
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
    },
    "flux": {"transformer": "lora_unet_", "text_encoder": "lora_te1_"},
}


def kohya_names(layers: Iterable[str], family: str) -> dict[str, list[str]]:
    """Every name in kohya's words to the layers that are its rows."""
    released_by_part = {
        part: (released, parts)
        for released, parts in RELEASED_LAYERS[family].items()
        for part in parts
    }
    names = {}
    for layer in layers:
        component, _, name = layer.partition(".")
        block = re.match(r"\w*blocks\.(\d+)", name) if component == "transformer" else None
        number = block[1] if block else ""
        pattern = name.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else name
        released, parts = released_by_part.get(pattern, (pattern, [pattern]))
        stem = KOHYA_PREFIXES[family][component] + released.replace("{}", number).replace(".", "_")
        names[stem] = [f"{component}.{part.replace('{}', number)}" for part in parts]
    return names


def swapped_layers(layers: Layers, family: str) -> set[str]:
    """Layers whose output halves, scale and shift, diffusers has in the other order than the
    release."""
    contexts = [
        name for name in layers if family == "sd3" and name.endswith(".norm1_context.linear")
    ]
    last = max(contexts, key=lambda name: int(name.split(".")[2]), default="")
    return {last, "transformer.norm_out.linear"} if RELEASED_LAYERS[family] else set()


def swap_halves(b: Tensor) -> Tensor:
    return b.roll(len(b) // 2, 0)


def to_kohya(lora: Lora, layers: Layers, family: str) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha is the rank."""
    state, swapped = {}, swapped_layers(layers, family)
    for stem, parts in kohya_names(layers, family).items():
        if any(part in lora for part in parts):
            updates = [lora.get(part) for part in parts]
            if parts[0] in swapped:
                updates = [LoraUpdate(update.a, swap_halves(update.b)) for update in updates]
            update = stack_updates(updates, [layers[part] for part in parts])
            state[f"{stem}.lora_down.weight"] = update.a.contiguous()
            state[f"{stem}.lora_up.weight"] = update.b.contiguous()
            state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state


def from_kohya(state: Mapping[str, Tensor], layers: Layers, family: str) -> tuple[Lora, list[str]]:
    """And the names that no layer of the base answers to. Raises: UserError for what is not plain
    LoRA."""
    lora, unknown = {}, []
    names, swapped = kohya_names(layers, family), swapped_layers(layers, family)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, kind = key.partition(".")
        entries.setdefault(stem, {})[kind] = value.float()
    for stem, entry in entries.items():
        if extra := entry.keys() - {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise UserError(
                f"{stem} has {', '.join(sorted(extra))}: only plain LoRA can be read, not its "
                f"relatives"
            )
        parts = names.get(stem)
        if parts is None:
            unknown.append(stem)
            continue
        a, b = entry["lora_down.weight"], entry["lora_up.weight"]
        b = b * (entry["alpha"].item() / len(a)) if "alpha" in entry else b
        for part, update in zip(
            parts, split_update(LoraUpdate(a, b), [layers[part] for part in parts]), strict=True
        ):
            if update:
                lora[part] = (
                    LoraUpdate(update.a, swap_halves(update.b)) if part in swapped else update
                )
    return lora, unknown
