"""LoKr and LoHa layers through PEFT: made for a run, read back, and made from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer
from torch import Tensor, nn

from trainers.config import LoraConfig
from trainers.families import Family
from trainers.lora.base_layers import name_prefix
from trainers.lora.lycoris import LOHA, LOKR, LycorisUpdate, tensor_names
from trainers.lora.update import Lora

ADAPTER = "default"


def make_config(config: LoraConfig, shared: Mapping[str, object]) -> LycorisConfig:
    """PEFT's config of a run; shared: ranks and layers."""
    alpha = float(config.alpha or config.rank)
    if config.type == LOHA:
        return LoHaConfig(alpha=alpha, **shared)
    return LoKrConfig(
        alpha=alpha,
        **shared,
        # the second factor starts at zero, as other trainers' does
        init_weights="lycoris",
        decompose_both=config.decompose_both,
        decompose_factor=config.decompose_factor,
    )


class PlainForward:
    """PEFT's layer for one adapter without its module dropout.

    PEFT draws a number for that in each layer, where nobody asks for it, and a plan of the memory
    has no numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        output, base = self.base_layer(x), self.get_base_layer()
        if self.disable_adapters or self.merged:
            return output
        weight = self.get_delta_weight(ADAPTER)
        x_own = x.to(weight.dtype)
        if isinstance(base, nn.Conv2d):
            places = base.stride, base.padding, base.dilation, base.groups
            added = F.conv2d(x_own, weight, None, *places)
        else:
            added = F.linear(x_own, weight)
        return (output + added).to(x.dtype)


@cache
def with_plain_forward(layer_class: type[LycorisLayer]) -> type[LycorisLayer]:
    return type(layer_class.__name__, (PlainForward, layer_class), {})


@torch.no_grad()
def start_layers(module: nn.Module) -> None:
    """Let the layers of a module start as LyCORIS's do."""
    for layer in module.modules():
        if isinstance(layer, LycorisLayer):
            layer.__class__ = with_plain_forward(type(layer))
        if isinstance(layer, LoHaLayer):
            # PEFT's own start is so small that at the usual rates it hardly learns
            layer.hada_w1_a[ADAPTER].normal_(std=0.1)
            layer.hada_w1_b[ADAPTER].normal_()
            layer.hada_w2_a[ADAPTER].zero_()
            layer.hada_w2_b[ADAPTER].normal_()


def read_layers(family: Family, text_encoders: Sequence[str]) -> Lora:
    """The updates that the family's layers compute now."""
    lora: Lora = {}
    for component in (family.denoiser_name, *text_encoders):
        module = getattr(family.pipe, component)
        prefix = name_prefix(component, module)
        for name, layer in module.named_modules():
            if isinstance(layer, LycorisLayer):
                lora[prefix + name] = read_layer(layer)
    return lora


def read_layer(layer: LycorisLayer) -> LycorisUpdate:
    """What a layer adds to its weight. The scale goes into the first factor, because ComfyUI and
    LyCORIS leave alpha out of account where both factors are whole, and PEFT does not."""
    kind = LOHA if isinstance(layer, LoHaLayer) else LOKR
    tensors = {}
    for name in tensor_names(kind):
        table = dict(layer.named_children()).get(name)
        if table is not None and ADAPTER in table:
            tensors[name] = table[ADAPTER].detach().float().cpu()
    shape = weight_shape(layer.get_base_layer())
    return LycorisUpdate.scaled(tensors, layer.scaling[ADAPTER], shape)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """By what the layer says of itself: its weight may wait elsewhere (model.offload)."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return (layer.out_features, layer.in_features)


@torch.no_grad()
def put_on(family: Family, lora: Lora, adapter: str = ADAPTER) -> None:
    """Put updates on the loaded pipeline, as an adapter that can be turned off and scaled."""
    for component in dict.fromkeys(name.partition(".")[0] for name in lora):
        module = getattr(family.pipe, component)
        prefix = name_prefix(component, module)
        own = {name.removeprefix(prefix): u for name, u in lora.items() if name.startswith(prefix)}
        kind = next(iter(own.values())).kind
        config_class = LoHaConfig if kind == LOHA else LoKrConfig
        # of rank 1, for the tensors are replaced
        module.add_adapter(config_class(r=1, alpha=1, target_modules=[*own]), adapter)
        for name, update in own.items():
            layer = module.get_submodule(name)
            device = layer.get_base_layer().weight.device
            for tensor_name, table in layer.named_children():
                if tensor_name not in tensor_names(kind):
                    continue
                if adapter in table:
                    del table[adapter]
                if tensor_name in update.tensors:
                    tensor = update.tensors[tensor_name].to(device)
                    table[adapter] = nn.Parameter(tensor, requires_grad=False)
