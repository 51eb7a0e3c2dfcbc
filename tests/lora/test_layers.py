"""LoRA goes into the layers that the config names, and computes and writes what PEFT does."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn

from tests.shared.families import ALL, FLOWS, TEXT, UNETS, whole
from trainers import dreambooth
from trainers.config import LoraConfig
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora.export import lora_state
from trainers.lora.layers import add_lora, target_layers
from trainers.lora.lora_linear import LoraLinear


def under(block, *layers):
    return {f"{block}.{layer}" for layer in layers}


SELF = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF, "add_q_proj", "add_k_proj", "add_v_proj")
FORWARD = ("ff.net.0.proj", "ff.net.2")
CONTEXT = ("ff_context.net.0.proj", "ff_context.net.2")
PLACES = [
    "down_blocks.0.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
    "mid_block.attentions.0",
]
UNET = [f"{place}.transformer_blocks.0" for place in PLACES]
XL_PLACES = [
    "down_blocks.1.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "mid_block.attentions.0",
]
XL = [f"{place}.transformer_blocks.{i}" for place in XL_PLACES for i in (0, 1)]
ATTENTION = {
    "sd15": set().union(*(under(f"{block}.attn{i}", *SELF) for block in UNET for i in (1, 2))),
    "sdxl": set().union(*(under(f"{block}.attn{i}", *SELF) for block in XL for i in (1, 2))),
    "sd3": under("transformer_blocks.0.attn", *JOINT, "to_add_out")
    | under("transformer_blocks.0.attn2", *SELF)
    | under("transformer_blocks.1.attn", *JOINT),
    "flux": under("transformer_blocks.0.attn", *JOINT, "to_add_out")
    | set().union(
        *(under(f"single_transformer_blocks.{i}.attn", "to_q", "to_k", "to_v") for i in (0, 1))
    ),
}
MLP = {
    "sd15": set().union(*(under(block, *FORWARD) for block in UNET)),
    "sdxl": set().union(*(under(block, *FORWARD) for block in XL)),
    "sd3": under("transformer_blocks.0", *FORWARD, *CONTEXT)
    | under("transformer_blocks.1", *FORWARD),
    "flux": under("transformer_blocks.0", *FORWARD, *CONTEXT)
    | set().union(
        *(under(f"single_transformer_blocks.{i}", "proj_mlp", "proj_out") for i in (0, 1))
    ),
}


@pytest.fixture
def adapted(settings):
    """A function: family name, overrides -> the denoiser's layers that have LoRA."""

    def make(name, *overrides):
        config = settings(*overrides, family=name)
        family = FAMILIES[name](config.model)
        family.load(family.denoiser_name)
        add_lora(family, config.lora, ())
        return {
            layer
            for layer, module in family.denoiser.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    return make


@pytest.mark.parametrize("name", ALL)
def test_presets_select_these_layers_and_no_others(adapted, pipes, name):
    denoiser = pipes[name].unet if name in UNETS else pipes[name].transformer
    linear = {layer for layer, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert adapted(name) == ATTENTION[name]
    assert adapted(name, "lora.target_modules=attention+mlp") == ATTENTION[name] | MLP[name]
    assert adapted(name, "lora.target_modules=all-linear") == linear


WISHES = {
    "endings": (
        "flux",
        ("lora.target_modules=[to_add_out, norm_out.linear]",),
        ["transformer_blocks.0.attn.to_add_out", "norm_out.linear"],
    ),
    "a convolution": ("sd3", ("lora.target_modules=[pos_embed.proj]",), ["pos_embed.proj"]),
    "a regex of whole names": (
        "flux",
        (r"lora.target_modules=transformer_blocks\.\d\.attn\.to_[qk]",),
        ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"],
    ),
    "blocks": (
        "flux",
        ("lora.blocks=[single_transformer_blocks.1]",),
        [f"single_transformer_blocks.1.attn.{layer}" for layer in ("to_q", "to_k", "to_v")],
    ),
    "blocks and a list": (
        "sd3",
        (
            "lora.blocks=[transformer_blocks.1, transformer_blocks.0.attn2]",
            "lora.target_modules=[to_v]",
        ),
        ["transformer_blocks.1.attn.to_v", "transformer_blocks.0.attn2.to_v"],
    ),
    "blocks and a regex": (
        "sd15",
        ("lora.blocks=[mid_block]", "lora.target_modules=.*attn1.to_q"),
        ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
    ),
}


@pytest.mark.parametrize(("name", "overrides", "layers"), WISHES.values(), ids=WISHES)
def test_target_modules_select_these_layers_and_no_others(adapted, name, overrides, layers):
    assert adapted(name, *overrides) == set(layers)


@pytest.mark.parametrize(("rslora", "scale"), [("false", 5 / 2), ("true", 5 / 2**0.5)])
def test_the_update_is_scaled_by_alpha_over_rank_and_written_as_b_a(settings, rslora, scale):
    config = settings("lora.alpha=5", f"lora.use_rslora={rslora}", family="sd3")
    family = whole(config)
    add_lora(family, config.lora, family.clip_encoders)
    for part in ("transformer", *family.clip_encoders):
        modules = getattr(family.pipe, part).named_modules()
        name, layer = next(
            (name, module) for name, module in modules if isinstance(module, BaseTunerLayer)
        )
        a, b, x = (
            layer.lora_A["default"],
            layer.lora_B["default"],
            torch.randn(3, layer.in_features),
        )
        nn.init.normal_(b.weight)
        update = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(update, scale * b(a(x)), rtol=1e-4, atol=1e-4, msg=part)
        written = lora_state(getattr(family.pipe, part))
        product = written[f"{name}.lora_B.weight"] @ written[f"{name}.lora_A.weight"]
        torch.testing.assert_close(update, x @ product.T, rtol=1e-4, atol=1e-4, msg=part)


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (2, 3, 7, 6)])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", True)]
)
def test_a_lora_layer_in_training_gives_the_output_and_gradients_of_pefts_own(
    shape, dtype, autocast
):
    torch.manual_seed(0)
    base = nn.Linear(6, 5).to(getattr(torch, dtype)).requires_grad_(False)
    layer = LoraLinear(base, "default", PeftConfig(init_lora_weights=False), r=3, lora_alpha=5)
    for parameter in trainable_parameters(layer).values():
        parameter.data = parameter.data.float()
    x, toward, found = torch.randn(shape), torch.randn(*shape[:-1], 5), []
    for forward in (layer, partial(lora_layer.Linear.forward, layer)):
        given = x.clone().to(base.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(given)
        layer.zero_grad()
        y.backward(toward.to(y.dtype))
        found.append([y, given.grad, *(p.grad for p in trainable_parameters(layer).values())])
    close = {"rtol": 0.02, "atol": 0.05} if autocast else {}
    torch.testing.assert_close(found[0], found[1], **close)


def test_a_blocks_name_is_not_the_beginning_of_anothers():
    blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(1, 1)}) for _ in range(11)])
    found = target_layers(
        nn.ModuleDict({"blocks": blocks}),
        LoraConfig(target_modules=["to_q"], blocks=["blocks.1"]),
        {},
    )
    assert found == ["blocks.1.to_q"]


UNMET = {
    "an ending": (
        "sd3",
        ("lora.target_modules=[to_k, to_qq]",),
        r"lora\.target_modules: .*'to_qq'.*\bto_q \(3\)",
    ),
    "a regex": (
        "flux",
        ("lora.target_modules=proj_mpl",),
        r"lora\.target_modules: 'proj_mpl'.*\bproj_mlp \(2\)",
    ),
    "a block": (
        "flux",
        ("lora.blocks=[single_transformer_blocks.0, single_transformer_blocks.7]",),
        r"lora\.blocks: .*'single_transformer_blocks\.7'.*\bsingle_transformer_blocks\.1 \(3\)",
    ),
    "a block without such layers": (
        "sd3",
        ("lora.blocks=[transformer_blocks.1]", "lora.target_modules=[attn2.to_q]"),
        r"lora\.blocks: none of the 1 layers is in "
        r"'transformer_blocks\.1'.*\btransformer_blocks\.0 \(1\)",
    ),
}


@pytest.mark.parametrize(("name", "overrides", "message"), UNMET.values(), ids=UNMET)
def test_target_modules_that_match_nothing_are_reported_with_similar_names_and_their_counts(
    adapted, name, overrides, message
):
    with pytest.raises(UserError, match=message):
        adapted(name, *overrides)


@pytest.mark.parametrize("name", FLOWS)
def test_the_file_has_peft_names_and_clips_keep_their_level(settings, tmp_path, name):
    """ComfyUI and kohya's readers know CLIP by `text_model.`, which transformers 5 dropped from one
    of its classes."""
    task, _, _ = dreambooth.build(
        settings(TEXT, "lora.target_modules=attention+mlp", family=name), Accelerator(cpu=True)
    )
    task.save(tmp_path)
    layers = {f"transformer.{layer}" for layer in ATTENTION[name] | MLP[name]}
    for encoder in ("text_encoder", "text_encoder_2") if name == "sd3" else ("text_encoder",):
        for i in (0, 1):
            block = f"{encoder}.text_model.encoder.layers.{i}.self_attn"
            layers |= under(block, "q_proj", "k_proj", "v_proj", "out_proj")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"
        }
