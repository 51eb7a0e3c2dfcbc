"""LoKr and LoHa: what is trained is what ComfyUI, PEFT and we read of the file."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tests.shared.saved_loras import family_of
from trainers import dreambooth
from trainers.banners import describe_weights
from trainers.config import loading
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.families.sampling import with_lora_scale, without_lora
from trainers.lora import diffusers_format, peft_format
from trainers.lora.base_layers import adaptable_shapes, loaded_weights, merge_lora
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


STEM = "lora_unet_mid_block_attentions_0_proj_in"  # 8 x 8


@pytest.fixture
def sd15(bases):
    return FAMILIES["sd15"](family_of(bases["sd15"], "sd15").model)


def written(tmp_path, state):
    tensors = {f"{STEM}.{name}": tensor for name, tensor in state.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    return tmp_path / "file.safetensors"


def test_the_alpha_of_other_programs_counts_as_in_comfyui(sd15, tmp_path):
    shape = adaptable_shapes(sd15)["unet.mid_block.attentions.0.proj_in"]
    rows, columns = shape[0], shape[1]
    w1, w2_a, w2_b = torch.randn(2, 2), torch.randn(rows // 2, 3), torch.randn(3, columns // 2)
    state = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(6.0)}
    (update,) = read_lora(written(tmp_path, state), sd15).values()
    close(update.delta_weight(), 2 * torch.kron(w1, w2_a @ w2_b))
    state = {"lokr_w1": w1, "lokr_w2": w2_a @ w2_b, "alpha": torch.tensor(6.0)}
    (update,) = read_lora(written(tmp_path, state), sd15).values()
    close(update.delta_weight(), torch.kron(w1, w2_a @ w2_b))


BROKEN = {
    "half a factor": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8)}, "lacks a factor of its LoHa"),
    "another rank": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (2, 4)},
        "does not fit together",
    ),
    "another weight": ({"lokr_w1": (2, 2), "lokr_w2": (4, 5)}, "for another weight than the base"),
    "two kinds": ({"lokr_w1": (2, 2), "hada_w1_a": (8, 2)}, "not the tensors of one kind"),
    "Tucker": ({"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3)}, "more than LoKr or LoHa, such as a T"),
    "DoRA": ({"lokr_w1": (2, 2), "lokr_w2": (4, 4), "dora_scale": (8, 1)}, "more than LoKr or"),
}


@pytest.mark.parametrize(("shapes", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_update_of_the_layer_is_refused(sd15, tmp_path, shapes, message):
    path = written(tmp_path, {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=message):
        read_lora(path, sd15)


def test_an_update_of_several_layers_is_refused(bases, tmp_path):
    state = {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2)}
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"is the update of 3 layers of diffusers"):
        read_lora(tmp_path / "file.safetensors", family_of(bases["flux"], "flux"))


def test_numbers_that_are_not_finite_are_refused(sd15, tmp_path):
    state = {"lokr_w1": torch.full((2, 2), float("nan")), "lokr_w2": torch.ones(4, 4)}
    with pytest.raises(UserError, match="NaN or infinite"):
        read_lora(written(tmp_path, state), sd15)
    state = {"hada_w1_a": torch.ones(8, 1), "hada_w1_b": torch.ones(1, 8)}
    state |= {"hada_w2_a": torch.ones(8, 1), "hada_w2_b": torch.ones(1, 8)}
    for alpha, message in ((torch.ones(2), "alpha is one number"), (torch.tensor(1e39), "alpha")):
        with pytest.raises(UserError, match=message):
            read_lora(written(tmp_path, state | {"alpha": alpha}), sd15)


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
