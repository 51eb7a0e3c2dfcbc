"""The tensors of each layer in a LoRA file, by what they are, checked before they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainers.errors import UserError
from trainers.lora.other_files import (
    describe_other_file,
    describe_width,
    guess_model,
    known_widths,
)
from trainers.lora.update import Rows
from trainers.tensor_file import TensorFile, TensorInfo

# What a layer's tensors are: the factors of B A, its scale, and the magnitude of DoRA.
A, B, ALPHA, MAGNITUDE = "A", "B", "alpha", "magnitude"

# How their names end in the files of any program.
ENDINGS = {
    ".lora_A.weight": A,
    ".lora_B.weight": B,
    ".lora_A.default.weight": A,
    ".lora_B.default.weight": B,
    ".lora_A": A,
    ".lora_B": B,
    ".lora_down.weight": A,
    ".lora_up.weight": B,
    ".lora.down.weight": A,
    ".lora.up.weight": B,
    "_lora.down.weight": A,
    "_lora.up.weight": B,
    ".lora_linear_layer.down.weight": A,
    ".lora_linear_layer.up.weight": B,
    ".down.weight": A,
    ".up.weight": B,
    ".alpha": ALPHA,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
}

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

Shapes = Mapping[str, Sequence[int]]  # of the weights of the base's layers, by their names


@dataclass
class LayerTensors:
    """One layer of a file: the base's layers that are its rows, and the names of its tensors."""

    stem: str
    rows: Rows
    keys: dict[str, str] = field(default_factory=dict)  # A, B, ... to the full name


def find_layers(file: TensorFile, names: Mapping[str, Rows], shapes: Shapes) -> list[LayerTensors]:
    """Every layer of the file, which fits the base.

    Raises: UserError for a file that is something else, has tensors that belong to no layer of the
    base, lacks half of a pair, or has other shapes than the base.
    """
    other = describe_other_file(file.tensors)
    if other:
        raise UserError(f"{file.path}: {other}")
    layers, unknown = group_tensors(file, names)
    check_shapes(file, layers, unknown, shapes)
    check_unknown(file, unknown)
    for layer in layers:
        check_pair(file, layer)
    check_overlaps(file, layers)
    return layers


def group_tensors(
    file: TensorFile, names: Mapping[str, Rows]
) -> tuple[list[LayerTensors], list[str]]:
    """The layers of the file, and the names of the tensors that belong to none of the base's."""
    layers: dict[str, LayerTensors] = {}
    unknown = []
    for key in file.tensors:
        stem, kind = split_key(key, names)
        if stem is None:
            unknown.append(key)
            continue
        layer = layers.setdefault(stem, LayerTensors(stem, names[stem]))
        if kind in layer.keys:
            raise UserError(
                f"{file.path}: {layer.keys[kind]!r} and {key!r} are the same tensor of a layer: "
                "only one of them can be meant"
            )
        layer.keys[kind] = key
    return list(layers.values()), unknown


def split_key(key: str, names: Mapping[str, Rows]) -> tuple[str | None, str]:
    """The name of a layer and what the tensor is of it; None for no layer of the base."""
    for ending, kind in ENDINGS.items():
        stem = key.removesuffix(ending)
        if stem != key and stem in names:
            return stem, kind
    return None, ""


def check_shapes(
    file: TensorFile, layers: Sequence[LayerTensors], unknown: Sequence[str], shapes: Shapes
) -> None:
    """Raises: UserError where a factor does not fit the base's weight."""
    wrong = []
    for layer in layers:
        a, b = (file.tensors.get(layer.keys.get(kind, "")) for kind in (A, B))
        weights = [shapes[name] for name in layer.rows.layers]
        outputs = sum(weight[0] for weight in weights)
        inputs = weights[0][1:]
        if a and not takes_inputs(a, inputs):
            wrong.append((layer, a.shape[1] if len(a.shape) > 1 else 0, inputs[0], "inputs"))
        elif b and not gives_outputs(b, outputs):
            wrong.append((layer, b.shape[0] if b.shape else 0, outputs, "outputs"))
    if not wrong:
        return
    # inputs of a known width tell more than others
    layer, found, expected, side = max(
        wrong, key=lambda row: (row[3] == "inputs", row[1] in known_widths())
    )
    if found == expected:
        width = "its kernel is another one"
    elif side == "inputs":
        width = describe_width(found, expected)
    else:
        width = f"it has {found} outputs, the base has {expected}"
    total = len(layers) + len(unknown)
    others = f"; {len(unknown)} tensors are of layers that the base lacks" if unknown else ""
    raise UserError(
        f"{file.path}: {len(wrong)} of {total} layers have other shapes than the base, for example "
        f"{layer.stem}: {width}{others}"
    )


def takes_inputs(a: TensorInfo, inputs: Sequence[int]) -> bool:
    """Whether A (r, in, ...) fits a weight (out, *inputs); 1 x 1 kernels may be left out."""
    own = a.shape[1:]
    if tuple(own) == tuple(inputs):
        return True
    kernels = (*own[1:], *inputs[1:])
    is_flat = len(own) == 1 and own[0] == math.prod(inputs)
    return is_flat or (own[:1] == tuple(inputs[:1]) and all(size == 1 for size in kernels))


def gives_outputs(b: TensorInfo, outputs: int) -> bool:
    is_matrix = len(b.shape) >= 2 and all(size == 1 for size in b.shape[2:])
    return is_matrix and b.shape[0] == outputs


def check_unknown(file: TensorFile, unknown: Sequence[str]) -> None:
    """Raises: UserError where tensors belong to no layer of the base: they are never dropped."""
    if not unknown:
        return
    model = guess_model(unknown)
    hint = f". Such names are of {model}" if model else ""
    raise UserError(
        f"{file.path}: {len(unknown)} of {len(file.tensors)} tensors are of layers that are not in "
        f"this base model, for example {', '.join(unknown[:3])}{hint}. The file was trained for "
        "another model, or has more in it than a LoRA for this one"
    )


def check_pair(file: TensorFile, layer: LayerTensors) -> None:
    """Raises: UserError for tensors of a layer that do not go together."""
    keys, tensors = layer.keys, file.tensors
    for kind, other in ((A, B), (B, A)):
        if kind not in keys:
            present = keys.get(other) or next(iter(keys.values()))
            raise UserError(
                f"{file.path}: {present} is there without the layer's other half ({kind})"
            )
    a, b = tensors[keys[A]], tensors[keys[B]]
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UserError(
            f"{file.path}: {layer.stem} has rank {a.shape[0]} in A {list(a.shape)} and rank "
            f"{b.shape[1]} in B {list(b.shape)}; they must be the same, and at least 1"
        )
    for kind in (A, B, MAGNITUDE):
        if kind in keys and tensors[keys[kind]].dtype not in FLOATS:
            raise UserError(
                f"{file.path}: {keys[kind]} is of type {tensors[keys[kind]].dtype}; only floating "
                "point can be read"
            )
    check_size(file, keys.get(ALPHA), 1, "alpha is one number")
    what = f"DoRA has a magnitude for each of the layer's {b.shape[0]} outputs"
    check_size(file, keys.get(MAGNITUDE), b.shape[0], what)
    if MAGNITUDE in keys and len(layer.rows.layers) > 1:
        raise UserError(f"{file.path}: {keys[MAGNITUDE]} is of several layers: DoRA is not read so")


def check_size(file: TensorFile, key: str | None, size: int, what: str) -> None:
    """Raises: UserError where the tensor, if there is one, has another number of elements."""
    shape = file.tensors[key].shape if key else ()
    if key and math.prod(shape) != size:
        raise UserError(f"{file.path}: {key} has the shape {list(shape)}; {what}")


def check_overlaps(file: TensorFile, layers: Sequence[LayerTensors]) -> None:
    """Raises: UserError where two names in the file are of one layer of the base."""
    owners: dict[str, str] = {}
    for layer in layers:
        for name in layer.rows.layers:
            if name in owners:
                raise UserError(
                    f"{file.path}: {owners[name]} and {layer.stem} are the same layer: only one of "
                    "them can be meant"
                )
            owners[name] = layer.stem
