"""LoRA in the words of other programs: what diffusers, PEFT and kohya's family of readers call each layer.

Kohya's names (sd-scripts, A1111, ComfyUI) for SD3 and Flux.1 are those of the models' first release, where one layer
may hold several of diffusers' as its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import UserError


@dataclass(frozen=True)
class Update:
    """What LoRA adds to a layer's weight, B A, with the scale folded in: a (r, in, ...), b (out, r, ...), float32."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Tensor:
        """(out, in x kernel)."""
        return self.b.flatten(1) @ self.a.flatten(1)


Lora = dict[str, Update]  # by component and module, as in "unet.mid_block.attentions.0.proj_in"
Layers = Mapping[str, int]  # every layer of a base that LoRA can be on, and its outputs


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


def stack(updates: Sequence[Update | None], outputs: Sequence[int]) -> Update:
    """The update of a layer whose rows are several layers; exact, at the sum of their ranks unless they share one a."""
    if len(updates) == 1:
        return updates[0]
    here = [update for update in updates if update]
    if len(here) == len(updates) and all(torch.equal(update.a, here[0].a) for update in here):
        return Update(here[0].a, torch.cat([update.b for update in here]))
    b, row, column = torch.zeros(sum(outputs), sum(update.rank for update in here)), 0, 0
    for update, height in zip(updates, outputs, strict=True):
        if update:
            b[row : row + height, column : column + update.rank] = update.b
            column += update.rank
        row += height
    return Update(torch.cat([update.a for update in here]), b)


def split(update: Update, outputs: Sequence[int]) -> list[Update | None]:
    """The inverse of `stack`; None where nothing is added."""
    if len(outputs) == 1:
        return [update]
    parts = []
    for b in update.b.split(list(outputs)):
        used = b.abs().sum(0) > 0
        parts.append(Update(update.a[used], b[:, used]) if used.any() else None)
    return parts


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


def from_peft(state: Mapping[str, Tensor], configs: Mapping[str, dict]) -> Lora:
    """Tensors NAME.lora_A.weight and NAME.lora_B.weight; configs: PEFT's, by component; without one alpha = rank.

    An own alpha of a layer, NAME.alpha, goes before. Raises: UserError for what is not plain LoRA.
    """
    lora = {}
    for key, a in state.items():
        name, _, kind = key.partition(".lora_")
        if kind not in ("A.weight", "B.weight") and not key.endswith(".alpha"):
            raise UserError(f"{key}: only plain LoRA can be read, not its relatives")
        if kind == "A.weight":
            component, _, module = name.partition(".")
            rank, config = len(a), configs.get(component) or {}
            alpha = pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
            alpha = state[f"{name}.alpha"].item() if f"{name}.alpha" in state else alpha
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            lora[name] = Update(a.float(), state[f"{name}.lora_B.weight"].float() * scale)
    return lora


def pattern(table: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regex, is the name or its end."""
    fits = (value for key, value in (table or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)


def to_peft(lora: Lora) -> dict[str, Tensor]:
    """Diffusers' tensors, or with the component cut off those of a PEFT folder; alpha is the rank."""
    state = {}
    for name, update in lora.items():
        state[f"{name}.lora_A.weight"] = update.a.contiguous()
        state[f"{name}.lora_B.weight"] = update.b.contiguous()
    return state


def peft_config(lora: Lora) -> dict:
    """Of one component's updates by module name: alpha is the rank in each layer."""
    ranks = [update.rank for update in lora.values()]
    usual = max(set(ranks), key=ranks.count)
    special = {re.escape(name): update.rank for name, update in lora.items() if update.rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": special, "alpha_pattern": special} | {
        "target_modules": sorted(lora)
    }


def diffusers_metadata(lora: Lora) -> str:
    """What diffusers keeps of PEFT's configs in a file's header."""
    flat = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in lora):
        own = {name.removeprefix(f"{component}."): u for name, u in lora.items() if name.startswith(f"{component}.")}
        flat |= {f"{component}.{key}": value for key, value in peft_config(own).items()}
    return json.dumps(flat, indent=2, sort_keys=True)
