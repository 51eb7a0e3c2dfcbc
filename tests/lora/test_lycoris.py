"""LoKr and LoHa: what is trained is what ComfyUI, PEFT and we read of the file."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load_file
from torch import nn

from tests.shared.saved_loras import family_of
from trainers import dreambooth
from trainers.banners import describe_weights
from trainers.config import loading
from trainers.distributed.trained_weights import trainable_parameters
from trainers.families.sampling import with_lora_scale, without_lora
from trainers.lora import diffusers_format, peft_format
from trainers.lora.base_layers import loaded_weights, merge_lora
from trainers.lora.files import load_run_file, read_lora
from trainers.lora.low_rank import reduce_rank, svd
from trainers.lora.proof import check_keys
from trainers.lora.update import max_relative_difference
from trainers.run_folder import WEIGHT_NAME

LAYERS = "lora.target_modules=[to_q, ff.net.2, proj_in, conv1, conv_shortcut]"
FLUX = "lora.target_modules=attention+mlp"
KINDS = {
    "lokr": ("sd15", "lora.type=lokr", LAYERS, "lora.alpha=3"),
    "lokr of whole factors": ("sd15", "lora.type=lokr", LAYERS, "lora.rank=64", "lora.alpha=16"),
    "lokr of two products": (
        "flux",
        "lora.type=lokr",
        FLUX,
        "lora.rank=1",
        "lora.decompose_both=true",
        "lora.decompose_factor=4",
    ),
    "loha": ("sd15", "lora.type=loha", LAYERS, "lora.alpha=3"),
    "loha of a transformer": ("flux", "lora.type=loha", FLUX, "lora.rank_pattern={to_q: 3}"),
}


@pytest.fixture
def build(settings):
    """A function: family, overrides -> its task, before its first step."""

    def make(family, *overrides):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = settings("lora.rank=2", *overrides, family=family)
        return dreambooth.build(config, Accelerator(cpu=True))[0]

    return make


def layers_of(task):
    """The layers by the names of the base's, with the component."""
    part = task.family.denoiser_name
    modules = task.family.denoiser.named_modules()
    return {f"{part}.{name}": m for name, m in modules if isinstance(m, LycorisLayer)}


@pytest.fixture(params=KINDS)
def trained(request, build, tmp_path):
    """A task nothing of which is zero, what its layers add, and its file."""
    task = build(*KINDS[request.param])
    assert not any(layer.get_delta_weight("default").any() for layer in layers_of(task).values())
    torch.manual_seed(0)
    for parameter in trainable_parameters(task.module).values():
        nn.init.normal_(parameter, std=0.3)
    task.save(tmp_path)
    deltas = {n: m.get_delta_weight("default").detach() for n, m in layers_of(task).items()}
    assert deltas
    return task, deltas, tmp_path / WEIGHT_NAME


def by_comfyui(state, stem):
    """What ComfyUI's weight_adapter/lokr.py and loha.py add to a weight, before it is reshaped."""
    own = {
        key[len(stem) + 1 :]: value for key, value in state.items() if key.startswith(f"{stem}.")
    }
    alpha, dim = own.get("alpha"), None
    if "hada_w1_a" in own:
        dim = len(own["hada_w1_b"])
        delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            if name not in own:
                dim = len(own[f"{name}_b"])
                own[name] = own[f"{name}_a"] @ own[f"{name}_b"]
            factors.append(own[name])
        w1, w2 = factors
        delta = torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2)
    return delta * (alpha.item() / dim) if alpha is not None and dim is not None else delta


def close(found, wanted):
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_comfyui_finds_in_the_file_what_is_trained(trained):
    task, deltas, path = trained
    state = load_file(path)
    is_unet = task.family.denoiser_name == "unet"
    stems = {key.rpartition(".")[0] for key in state}
    assert len(stems) == len(deltas)
    for name, delta in deltas.items():
        own = name.partition(".")[2]
        stem = "lora_unet_" + own.replace(".", "_") if is_unet else f"transformer.{own}"
        close(by_comfyui(state, stem), delta)
    # diffusers' `load_lora_adapter` of a transformer knows no alpha
    assert is_unet == any(key.endswith(".alpha") for key in state)


def test_it_is_read_put_on_and_merged(trained, bases):
    task, deltas, path = trained
    name = task.config.model.family
    family = family_of(bases[name], name)
    family.load(family.denoiser_name, *family.clip_encoders)
    lora = read_lora(path, family)
    assert lora.keys() == deltas.keys()
    for layer, update in lora.items():
        close(update.delta_weight(), deltas[layer])
    plain = {key: weight.clone() for key, weight in loaded_weights(family).items() if key in deltas}
    load_run_file(family, path, "one")
    check_keys(family, [family.denoiser_name], path)
    modules = dict(family.denoiser.named_modules())
    found = {key: modules[key.partition(".")[2]] for key in deltas}
    for key, delta in deltas.items():
        close(found[key].get_delta_weight("one"), delta)
    key = next(key for key in found if key.endswith(".to_q"))
    x = torch.randn(3, found[key].in_features)
    base, whole = found[key].base_layer(x), found[key](x)
    half = with_lora_scale(family, 0.5, lambda: found[key](x))
    close(half - base, (whole - base) / 2)
    with without_lora(family):
        assert torch.equal(found[key](x), base)
    fresh = family_of(bases[name], name)
    fresh.load(fresh.denoiser_name, *fresh.clip_encoders)
    merge_lora(fresh, lora)
    for key, weight in plain.items():
        close(loaded_weights(fresh)[key], weight + deltas[key])


def test_a_layer_in_training_adds_its_update(trained):
    task, deltas, _ = trained
    layers = layers_of(task)
    for key, delta in deltas.items():
        layer = layers[key].train()
        base = layer.get_base_layer()
        is_linear = isinstance(base, nn.Linear)
        x = (
            torch.randn(2, base.in_features)
            if is_linear
            else torch.randn(2, base.in_channels, 6, 6)
        )
        found, plain = layer(x), base(x)
        merged = copy.deepcopy(base)
        merged.weight = nn.Parameter(base.weight + delta)
        torch.testing.assert_close(found, merged(x), rtol=1e-4, atol=1e-4)
        half = layer.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        layer.enable_adapters(False)
        assert torch.equal(layer.float()(x), base(x))
        assert not torch.equal(found, plain)


def test_peft_loads_its_folder(trained, bases, tmp_path):
    task, deltas, path = trained
    family, part = task.family, task.family.denoiser_name
    lora = read_lora(path, family)
    peft_format.write(lora, family, tmp_path / "peft", {})
    assert max_relative_difference(lora, read_lora(tmp_path / "peft", family)) < 1e-6
    module = getattr(DiffusionPipeline.from_pretrained(bases[task.config.model.family]), part)
    PeftModel.from_pretrained(module, tmp_path / "peft" / part)
    found = {f"{part}.{n}": m for n, m in module.named_modules() if isinstance(m, LycorisLayer)}
    assert found.keys() == deltas.keys()
    for key, layer in found.items():
        close(layer.get_delta_weight("default"), deltas[key])


def test_its_nearest_lora_is_that_of_the_whole_update(trained):
    task, deltas, path = trained
    lora = read_lora(path, task.family)
    key, update = next(iter(lora.items()))
    values = torch.linalg.svdvals(deltas[key].flatten(1).double())
    torch.testing.assert_close(svd(update)[1][: len(values)], values[: len(svd(update)[1])])
    whole, lost = reduce_rank(lora, 10_000)
    assert lost == 0
    assert max_relative_difference(lora, whole) < 1e-5
    assert 0 < reduce_rank(lora, 1)[1] < 1


def test_diffusers_loads_a_lokr_into_the_denoiser(build, bases, tmp_path):
    task = build("sd15", "lora.type=lokr")
    for parameter in trainable_parameters(task.module).values():
        nn.init.normal_(parameter, std=0.3)
    task.save(tmp_path)
    lora = read_lora(tmp_path / WEIGHT_NAME, task.family)
    diffusers_format.write(lora, task.family, tmp_path / "lokr.safetensors", {})
    unet = DiffusionPipeline.from_pretrained(bases["sd15"]).unet
    unet.load_lora_adapter(load_file(tmp_path / "lokr.safetensors"), prefix="unet")
    loaded = {f"unet.{n}": m for n, m in unet.named_modules() if isinstance(m, LycorisLayer)}
    for key, layer in layers_of(task).items():
        (adapter,) = loaded[key].scaling
        close(loaded[key].get_delta_weight(adapter), layer.get_delta_weight("default"))


def test_a_text_encoder_has_it_too(build, tmp_path):
    task = build("sd15", "lora.type=loha", "train.train_text_encoder=true")
    for parameter in trainable_parameters(task.module).values():
        nn.init.normal_(parameter, std=0.3)
    task.save(tmp_path)
    lora = read_lora(tmp_path / WEIGHT_NAME, task.family)
    encoder = {key: u for key, u in lora.items() if key.startswith("text_encoder.text_model.")}
    modules = dict(task.family.pipe.text_encoder.named_modules())
    assert encoder
    for key, update in encoder.items():
        own = key.removeprefix("text_encoder.")
        layer = modules.get(own) or modules[own.removeprefix("text_model.")]
        close(update.delta_weight(), layer.get_delta_weight("default"))
    assert describe_weights(task.config, task).startswith(f"LoHa of rank 2 in {len(lora)} layers")


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        ({"lora": {"use_dora": True, "dropout": 0.1}}, "lora.type", "lora.dropout, lora.use_dora"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.type", "lora.init_lora_weights"),
        ({"lora": {"use_rslora": True, "kohya": True}}, "lora.type", "lora.use_rslora, lora.kohya"),
        ({"model": {"quantization": "nf4"}}, "lora.type", "model.quantization=nf4"),
        ({"train": {"compile": True}}, "lora.type", "train.compile"),
        ({"optimizer": {"lora_plus_ratio": 4}}, "optimizer.lora_plus_ratio", "LoHa has no lora_B"),
        ({"lora": {"decompose_both": True}}, "lora.decompose_both", "with loha, only with lokr"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(overrides, key, message):
    tree = overrides | {"lora": overrides.get("lora", {}) | {"type": "loha"}}
    _, mistakes = loading.validate(tree, needs_pictures=False)
    (line,) = [line for line in mistakes if line.startswith(f"{key}:")]
    assert message in line
