"""LoRA files of any known format, checked against the base model and put on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora import diffusers_format, lycoris_files, peft_format
from trainers.lora.base_layers import adaptable_shapes
from trainers.lora.formats import all_layer_names
from trainers.lora.layer_tensors import ALPHA, MAGNITUDE, A, B, LayerTensors, Shapes, find_layers
from trainers.lora.lycoris import has_lycoris
from trainers.lora.lycoris_layers import put_on
from trainers.lora.peft_config import PeftScale
from trainers.lora.update import (
    Lora,
    LoraUpdate,
    Rows,
    is_dora,
    is_lycoris,
    split_update,
    swap_halves,
)
from trainers.tensor_file import TensorFile, read_header


def read_lora(path: Path, family: Family) -> Lora:
    """The updates in a LoRA file or PEFT folder, every tensor of which was used.

    Raises: UserError for what is not whole, not finite, not LoRA, DoRA, LoKr or LoHa, or not for
    this base.
    """
    adapters = peft_format.find_adapters(path, family) if path.is_dir() else {}
    if path.is_dir() and not adapters:
        raise UserError(f"{path}: there is no LoRA in it. A run writes its LoRA when it finishes")
    lora: Lora = {}
    if not adapters:
        lora = read_file(path, family)
    for component, folder in adapters.items():
        lora |= read_adapter(folder, component, family)
    if is_dora(lora):
        check_dora(lora, path)
    return lora


def read_file(path: Path, family: Family) -> Lora:
    """The updates in a file with any program's names."""
    file = read_header(path)
    if has_lycoris(file.tensors):
        config = path.parent / peft_format.CONFIG_NAME
        is_peft = path.name == peft_format.TENSORS_NAME
        return read_lycoris(file, all_layer_names(family), family, config if is_peft else None)
    scales = diffusers_format.read_scales(file)
    if not scales and path.name == peft_format.TENSORS_NAME:
        config = path.parent / peft_format.CONFIG_NAME
        scales = {family.denoiser_name: peft_format.read_scale(config)}
    return read_tensors(file, all_layer_names(family), adaptable_shapes(family), scales)


def read_adapter(folder: Path, component: str, family: Family) -> Lora:
    """The updates in a folder that PEFT wrote for a component. Raises: UserError."""
    if component not in (family.denoiser_name, *family.clip_encoders):
        raise UserError(f"{folder} is for {component}, on which no program loads a LoRA")
    config = folder / peft_format.CONFIG_NAME
    tensors = folder / peft_format.TENSORS_NAME
    old = tensors.with_suffix(".bin")
    # the reader of headers says what such a file is
    file = read_header(old if old.is_file() and not tensors.is_file() else tensors)
    names = peft_format.component_names(family, component)
    if component == family.denoiser_name:
        names = all_layer_names(family) | names
    if has_lycoris(file.tensors):
        return read_lycoris(file, names, family, config)
    scale = peft_format.read_scale(config)
    return read_tensors(file, names, adaptable_shapes(family), {component: scale})


def read_lycoris(
    file: TensorFile, names: Mapping[str, Rows], family: Family, config: Path | None
) -> Lora:
    """The updates in a file of LoKr or LoHa; config: that of PEFT, if it has one."""
    scale = None
    if config is not None:
        scale = lycoris_files.parse_scale(peft_format.read_config(config), str(config))
    return lycoris_files.read_tensors(file, names, adaptable_shapes(family), scale)


def read_tensors(
    file: TensorFile, names: Mapping[str, Rows], shapes: Shapes, scales: Mapping[str, PeftScale]
) -> Lora:
    """The updates in a file whose layers have these names, for weights of these shapes.

    scales: by component; without one alpha is the rank, unless the file has an alpha for the layer.
    """
    layers = find_layers(file, names, shapes)
    tensors = dict(file.load())
    lora: Lora = {}
    for layer in layers:
        own = {kind: tensors.pop(key) for kind, key in layer.keys.items()}
        weights = [shapes[name] for name in layer.rows.layers]
        update = make_update(layer, own, scales, len(weights[0]) - 2)
        check_finite(file, layer, update)
        if layer.rows.swaps_halves:
            update = swap_halves(update)
        parts = split_update(update, [weight[0] for weight in weights])
        for name, part, weight in zip(layer.rows.layers, parts, weights, strict=True):
            if part:
                a = part.a.reshape(part.rank, *weight[1:])
                lora[name] = LoraUpdate(a, part.b, part.magnitude)
    return lora


def make_update(
    layer: LayerTensors,
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PeftScale],
    kernel_dimensions: int,
) -> LoraUpdate:
    """The update of a layer in float32, with the scale folded in."""
    a, b = tensors[A].float(), tensors[B].float()
    component, _, module = layer.rows.layers[0].partition(".")
    alpha = tensors[ALPHA].item() if ALPHA in tensors else None
    scale = scales.get(component, PeftScale()).scale(module, len(a), alpha)
    magnitude = tensors[MAGNITUDE].float().flatten() if MAGNITUDE in tensors else None
    b = b.reshape(*b.shape[:2], *[1] * kernel_dimensions)
    return LoraUpdate(a, b if scale == 1 else b * scale, magnitude)


def check_finite(file: TensorFile, layer: LayerTensors, update: LoraUpdate) -> None:
    """Raises: UserError where a number is NaN or infinite."""
    for kind, tensor in ((A, update.a), (B, update.b), (MAGNITUDE, update.magnitude)):
        if tensor is None:
            continue
        # the sum of finite numbers may overflow; the least and the largest tell as much
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():
            broken = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{file.path}: {broken} of {tensor.numel()} numbers in {layer.keys[kind]} are NaN "
                "or infinite (with its scale). The training that wrote it diverged, or the file is "
                "damaged"
            )


def check_dora(lora: Lora, path: Path) -> None:
    """Raises: UserError where some layers of a component are DoRA and others are not."""
    for component, updates in peft_format.components(lora).items():
        plain = [name for name, update in updates.items() if update.magnitude is None]
        if plain and len(plain) < len(updates):
            raise UserError(
                f"{path}: {len(plain)} of {len(updates)} layers of {component} have no magnitude, "
                f"for example {plain[0]}, though the others are DoRA"
            )


def load_lora(family: Family, path: Path) -> None:
    """Put a LoRA file or PEFT folder of any format on the loaded pipeline.

    diffusers loads it from a file of its own format, whose header has the scale of each layer.
    """
    lora = read_lora(path, family)
    if is_lycoris(lora):
        put_on(family, lora)
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        diffusers_format.write(lora, family, file, {})
        family.pipe.load_lora_weights(folder, weight_name=file.name)


def load_run_file(family: Family, file: Path, adapter: str | None = None) -> None:
    """Put a file that a run wrote on the loaded pipeline; by diffusers, where it reads such a
    file."""
    if has_lycoris(read_header(file).tensors):
        put_on(family, read_lora(file, family), adapter or "default")
    else:
        family.pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter)
