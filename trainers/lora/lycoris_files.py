"""The tensors of LoKr and LoHa in a file, whatever program wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lokr.layer import factorization
from peft.tuners.lycoris_utils import LycorisConfig
from torch import Tensor

from trainers.config.lora_section import TITLES
from trainers.errors import UserError
from trainers.lora.layer_tensors import (
    FLOATS,
    LayerTensors,
    Shapes,
    check_overlaps,
    check_size,
    check_unknown,
)
from trainers.lora.lycoris import FACTORS, HALVES, LOHA, LOKR, LycorisUpdate, kind_of, tensor_names
from trainers.lora.peft_config import PeftScale, check_number, parse_pattern, rank_settings
from trainers.lora.update import Lora, Rows
from trainers.tensor_file import TensorFile

ALPHA = "alpha"
PEFT_TYPES = {"LOKR": LOKR, "LOHA": LOHA}
MERGE = "have the program that made it merge it into a whole model"


@dataclass(frozen=True)
class LycorisScale:
    """PEFT's rule: alpha / rank for every layer, whole factors or not."""

    alphas: PeftScale
    ranks: PeftScale  # the rank of each layer, in place of an alpha

    def scale(self, module: str) -> float:
        return self.alphas.layer_alpha(module) / self.ranks.layer_alpha(module)


def parse_scale(config: Mapping[str, object], where: str) -> LycorisScale:
    """What PEFT's config of LoKr or LoHa says of scales. Raises: UserError."""
    if config.get("peft_type") not in PEFT_TYPES:
        kind = config.get("peft_type")
        raise UserError(f"{where}: its peft_type is {kind!r}, and beside it lies a LoKr or LoHa")
    values = []
    for key, pattern in (("alpha", "alpha_pattern"), ("r", "rank_pattern")):
        number = check_number(config.get(key), key, where)
        values.append(PeftScale(number, parse_pattern(config.get(pattern), where)))
    ranks = values[1]
    if min([ranks.alpha, *ranks.alphas.values()]) < 1:
        raise UserError(f"{where}: it has a rank below 1")
    return LycorisScale(*values)


def read_tensors(
    file: TensorFile,
    names: Mapping[str, Rows],
    shapes: Shapes,
    scale: LycorisScale | None,
) -> Lora:
    """The updates in a file whose layers have these names, for weights of these shapes.

    scale: of PEFT's config; without one the rule is that of LyCORIS and ComfyUI. Raises: UserError
    for what is not whole, not finite, something else too, or not for this base.
    """
    layers = group_tensors(file, names)
    loaded = dict(file.load())
    lora: Lora = {}
    for layer in layers:
        (name,) = layer.rows.layers
        tensors = {kind: loaded[key] for kind, key in layer.keys.items()}
        check_size(file, layer.keys.get(ALPHA), 1, "alpha is one number")
        alpha = tensors.pop(ALPHA, None)
        tensors = {kind: tensor.float() for kind, tensor in tensors.items()}
        check_layer(file, layer.stem, tensors, shapes[name])
        if scale is not None:
            factor = scale.scale(name.partition(".")[2])
        else:
            factor = lycoris_scale(tensors, kind_of(tensors), alpha)
        if not math.isfinite(factor):
            raise UserError(f"{file.path}: {layer.keys[ALPHA]} is {factor}, no strength of a layer")
        lora[name] = LycorisUpdate.scaled(tensors, factor, shapes[name])
    return lora


def lycoris_scale(tensors: Mapping[str, Tensor], kind: str, alpha: Tensor | None) -> float:
    """alpha over the rank; one without an alpha, and where both factors are whole."""
    for factor in reversed(FACTORS[kind]):
        half = tensors.get(f"{factor}_b")
        if alpha is not None and half is not None:
            return alpha.item() / len(half)
    return 1.0


def group_tensors(file: TensorFile, names: Mapping[str, Rows]) -> list[LayerTensors]:
    """The layers of the file, each one layer of the base. Raises: UserError."""
    known = {ALPHA, *tensor_names(LOKR), *tensor_names(LOHA)} - {"hada_w1", "hada_w2"}
    layers: dict[str, LayerTensors] = {}
    unknown = []
    for key in file.tensors:
        stem, _, kind = key.rpartition(".")
        if stem not in names:
            unknown.append(key)
            continue
        if kind not in known:
            raise UserError(
                f"{file.path}: {key} is more than LoKr or LoHa, such as a Tucker decomposition, a "
                f"DoRA or a LoRA beside it, and cannot be read: {MERGE}"
            )
        layers.setdefault(stem, LayerTensors(stem, names[stem])).keys[kind] = key
    check_unknown(file, unknown)
    for layer in layers.values():
        if len(layer.rows.layers) > 1 or layer.rows.swaps_halves:
            raise UserError(
                f"{file.path}: {layer.stem} is the update of {len(layer.rows.layers)} layers of "
                f"diffusers, among which LoKr and LoHa cannot be divided: {MERGE}"
            )
    check_overlaps(file, [*layers.values()])
    return [*layers.values()]


def check_layer(
    file: TensorFile, stem: str, tensors: Mapping[str, Tensor], shape: Sequence[int]
) -> None:
    """Raises: UserError for tensors that make no update of a weight of this shape."""
    for name, tensor in tensors.items():
        if file.tensors[f"{stem}.{name}"].dtype not in FLOATS:
            raise UserError(f"{file.path}: {stem}.{name} is no floating point")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file.path}: {stem}.{name} has numbers that are NaN or infinite")
    kinds = {
        kind
        for kind in FACTORS
        for factor in FACTORS[kind]
        for name in tensors
        if name.startswith(factor)
    }
    if len(kinds) != 1:
        raise UserError(f"{file.path}: {stem} has not the tensors of one kind of update")
    (kind,) = kinds
    sizes = [factor_size(tensors, factor) for factor in FACTORS[kind]]
    if None in sizes:
        raise UserError(
            f"{file.path}: {stem} lacks a factor of its {TITLES[kind]}, or has one that does not "
            f"fit together: {describe_shapes(tensors)}"
        )
    wanted = shape[0], math.prod(shape[1:])
    if kind == LOHA:
        fits = sizes[0] == sizes[1] == wanted
    else:
        fits = tuple(x * y for x, y in zip(*sizes, strict=True)) == wanted
    if not fits:
        raise UserError(
            f"{file.path}: {stem} is for another weight than the base's of {list(shape)}: "
            f"{describe_shapes(tensors)}"
        )


def factor_size(tensors: Mapping[str, Tensor], factor: str) -> tuple[int, int] | None:
    """Rows and columns of a factor, the kernel being in its columns; None where it is not whole."""
    whole, halves = tensors.get(factor), [tensors.get(factor + half) for half in HALVES]
    if whole is not None:
        is_single = all(half is None for half in halves)
        fits = is_single and whole.ndim >= 2
        return (len(whole), whole[0].numel()) if fits else None
    if any(half is None or half.ndim != 2 for half in halves) or not len(halves[1]):
        return None
    rows, columns = halves[0].shape, halves[1].shape
    return (rows[0], columns[1]) if rows[1] == columns[0] else None


def describe_shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def make_peft_config(lora: Lora, where: Path) -> LycorisConfig:
    """PEFT's config of one component's updates by module, whose scale is one.

    Raises: UserError where no one config makes factors of these sizes.
    """
    settings = rank_settings({name: update.rank for name, update in lora.items()})
    shared = settings | {"alpha": settings.pop("lora_alpha"), "target_modules": sorted(lora)}
    kinds = {update.kind for update in lora.values()}
    if len(kinds) > 1:
        raise UserError(f"{where}: PEFT has one kind of update for a component, and here are two")
    if kinds == {LOHA}:
        return LoHaConfig(**shared)
    both = any("lokr_w1_a" in update.tensors for update in lora.values())
    sizes = [factor_sizes(update) for update in lora.values()]
    candidates = [-1, *sorted({side for pair in sizes for split in pair for side in split})]
    for factor in candidates:
        if all(factorization(x * y, factor) == (x, y) for pair in sizes for x, y in pair):
            return LoKrConfig(**shared, decompose_both=both, decompose_factor=factor)
    raise UserError(
        f"{where}: PEFT divides all widths by one factor, and this LoKr does not. Write it with "
        "--format kohya, merged, or with --rank N as plain LoRA"
    )


def factor_sizes(update: LycorisUpdate) -> tuple[tuple[int, int], tuple[int, int]]:
    """How LoKr splits a weight's outputs and its inputs."""
    rows, columns = update.factor("lokr_w1").shape
    return (rows, update.shape[0] // rows), (columns, update.shape[1] // columns)
