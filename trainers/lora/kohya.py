"""LoRA in the words of other programs: what diffusers, PEFT and kohya's family of readers call each layer.

Kohya's names (sd-scripts, A1111, ComfyUI) for SD3 and Flux.1 are those of the models' first release, where one layer
may hold several of diffusers' as its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from trainers.errors import UserError
from trainers.lora.update import Layers, Lora, Update, split, stack


def stacked(whole: str, names: str, part: str, rows: Sequence[str]) -> dict[str, list[str]]:
    """Each of the released names to the layers that are its rows."""
    pairs = zip(names.split(), rows, strict=True)
    return {whole + name: [part + row for row in parts.split()] for name, parts in pairs}


JOINT = ("attn.to_q attn.to_k attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")


CONTEXT = (
    *("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.to_add_out"),
    *("ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear"),
)


BLOCK, SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."


SD3, FLUX = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1", "attn.qkv attn.proj mlp.0 mlp.2 mod.lin"


ENDS, LAST = "final_layer.linear final_layer.adaLN_modulation.1", ("proj_out", "norm_out.linear")


TIME, POOLED, GUIDANCE = (f"time_text_embed.{kind}_embedder.linear_" for kind in ("timestep", "text", "guidance"))


RELEASED: dict[str, dict[str, list[str]]] = {  # a layer as released: diffusers' layers that are its rows
    "sd15": {},
    "sd3": {
        **stacked("joint_blocks.{}.x_block.", SD3, BLOCK, JOINT),
        **stacked("joint_blocks.{}.context_block.", SD3, BLOCK, CONTEXT),
        **stacked("joint_blocks.{}.x_block.attn2.", "qkv proj", BLOCK + "attn2.", ("to_q to_k to_v", "to_out.0")),
        **stacked("t_embedder.mlp.", "0 2", TIME, "12"),
        **stacked("y_embedder.mlp.", "0 2", POOLED, "12"),
        **stacked("", f"x_embedder.proj {ENDS}", "", ("pos_embed.proj", *LAST)),
    },
    "flux": {
        **stacked("double_blocks.{}.img_", FLUX, BLOCK, JOINT),
        **stacked("double_blocks.{}.txt_", FLUX, BLOCK, CONTEXT),
        **stacked("single_blocks.{}.linear", "1 2", SINGLE, ("attn.to_q attn.to_k attn.to_v proj_mlp", "proj_out")),
        **stacked("single_blocks.{}.", "modulation.lin", SINGLE, ("norm.linear",)),
        **stacked("time_in.", "in_layer out_layer", TIME, "12"),
        **stacked("vector_in.", "in_layer out_layer", POOLED, "12"),
        **stacked("guidance_in.", "in_layer out_layer", GUIDANCE, "12"),
        **stacked("", f"img_in txt_in {ENDS}", "", ("x_embedder", "context_embedder", *LAST)),
    },
}


KOHYA = {  # components to the beginnings of their names
    "sd15": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd3": {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "flux": {"transformer": "lora_unet_", "text_encoder": "lora_te1_"},
}


def kohya_names(layers: Iterable[str], family: str) -> dict[str, list[str]]:
    """Every name in kohya's words to the layers that are its rows."""
    home = {part: (whole, parts) for whole, parts in RELEASED[family].items() for part in parts}
    names = {}
    for layer in layers:
        component, _, name = layer.partition(".")
        block = re.match(r"\w*blocks\.(\d+)", name) if component == "transformer" else None
        number = block[1] if block else ""
        pattern = name.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else name
        whole, parts = home.get(pattern, (pattern, [pattern]))
        stem = KOHYA[family][component] + whole.replace("{}", number).replace(".", "_")
        names[stem] = [f"{component}.{part.replace('{}', number)}" for part in parts]
    return names


def swapped(layers: Layers, family: str) -> set[str]:
    """Layers whose output halves, scale and shift, diffusers has in the other order than the release."""
    contexts = [name for name in layers if family == "sd3" and name.endswith(".norm1_context.linear")]
    last = max(contexts, key=lambda name: int(name.split(".")[2]), default="")
    return {last, "transformer.norm_out.linear"} if RELEASED[family] else set()


def halves_swapped(b: Tensor) -> Tensor:
    return b.roll(len(b) // 2, 0)


def to_kohya(lora: Lora, layers: Layers, family: str) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha is the rank."""
    state, other = {}, swapped(layers, family)
    for stem, parts in kohya_names(layers, family).items():
        if any(part in lora for part in parts):
            updates = [lora.get(part) for part in parts]
            if parts[0] in other:
                updates = [Update(update.a, halves_swapped(update.b)) for update in updates]
            update = stack(updates, [layers[part] for part in parts])
            state[f"{stem}.lora_down.weight"] = update.a.contiguous()
            state[f"{stem}.lora_up.weight"] = update.b.contiguous()
            state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state


def from_kohya(state: Mapping[str, Tensor], layers: Layers, family: str) -> tuple[Lora, list[str]]:
    """And the names that no layer of the base answers to. Raises: UserError for what is not plain LoRA."""
    lora, unknown = {}, []
    names, other = kohya_names(layers, family), swapped(layers, family)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, kind = key.partition(".")
        entries.setdefault(stem, {})[kind] = value.float()
    for stem, entry in entries.items():
        if extra := entry.keys() - {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise UserError(f"{stem} has {', '.join(sorted(extra))}: only plain LoRA can be read, not its relatives")
        parts = names.get(stem)
        if parts is None:
            unknown.append(stem)
            continue
        a, b = entry["lora_down.weight"], entry["lora_up.weight"]
        b = b * (entry["alpha"].item() / len(a)) if "alpha" in entry else b
        for part, update in zip(parts, split(Update(a, b), [layers[part] for part in parts]), strict=True):
            if update:
                lora[part] = Update(update.a, halves_swapped(update.b)) if part in other else update
    return lora, unknown
