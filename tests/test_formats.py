"""Every reader finds the trained updates in the files: diffusers, PEFT, and the rules of ComfyUI
and sd-scripts."""

import hashlib
import json
import sys
from types import SimpleNamespace

import export as script
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainers import dreambooth
from trainers.config.family_facts import family_facts
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora import diffusers_format, kohya, peft_format
from trainers.lora.base_layers import adaptable_layers, adaptable_shapes, text_prefix
from trainers.lora.files import load_lora, read_lora
from trainers.lora.formats import READ_FORMATS
from trainers.lora.kohya import to_kohya
from trainers.lora.low_rank import lora_from_difference, reduce_rank
from trainers.lora.names import released_rows, swapped_layers, underscored
from trainers.lora.update import LoraUpdate, Rows, max_relative_difference, split_update
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

ALL = ("sd15", "sd3", "flux")
TRAINED = ("lora.alpha=5", "train.train_text_encoder=true", "lora.kohya=true")


@pytest.fixture(scope="module")
def made(bases, photos, tmp_path_factory):
    """Family name -> (folder of a saved task, the updates that its modules compute), alpha != rank,
    nothing zero."""
    from conftest import settings

    results = {}
    for name in ALL:
        folder = tmp_path_factory.mktemp(name)
        config = settings.__wrapped__(bases, photos, folder)(
            *TRAINED, "lora.target_modules=all-linear", family=name
        )
        task, _, _ = dreambooth.build(config, Accelerator(cpu=True))
        torch.manual_seed(0)
        updates = {}
        for part in (task.family.denoiser_name, *task.encoder.trained_encoders):
            module = getattr(task.family.pipe, part)
            for layer_name, layer in module.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    nn.init.normal_(layer.lora_B["default"].weight)
                    delta = layer.get_delta_weight("default").detach()
                    updates[f"{part}.{text_prefix(module)}{layer_name}"] = delta.flatten(1)
        folder = config.output_dir
        folder.mkdir(exist_ok=True)
        task.save(folder)
        results[name] = folder, updates
    return results


def check(found, wanted, tolerance=1e-5):
    """Name -> product, all there and near."""
    assert found.keys() == wanted.keys()
    for name, product in wanted.items():
        assert (found[name] - product).norm() <= tolerance * product.norm(), name


def products(lora):
    return {name: update.delta_weight() for name, update in lora.items()}


def family_of(folder_of_base, name):
    from trainers.config import ModelConfig

    return FAMILIES[name](
        ModelConfig(family=name, pretrained_model_name_or_path=str(folder_of_base))
    )


# Readers


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("file", [WEIGHT_NAME, KOHYA_NAME])
def test_our_own_reader_finds_every_update_in_both_files(made, bases, name, file):
    folder, updates = made[name]
    check(products(read_lora(folder / file, family_of(bases[name], name))), updates)


@pytest.mark.parametrize(
    ("name", "file"), [*((name, WEIGHT_NAME) for name in ALL), ("sd15", KOHYA_NAME)]
)
def test_diffusers_finds_every_update(made, bases, name, file):
    folder, updates = made[name]
    pipe = DiffusionPipeline.from_pretrained(bases[name])
    pipe.load_lora_weights(folder, weight_name=file)
    found = {}
    for part in dict.fromkeys(key.partition(".")[0] for key in updates):
        module = getattr(pipe, part)
        (adapter,) = module.peft_config
        for layer_name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                delta = layer.get_delta_weight(adapter).detach().flatten(1)
                found[f"{part}.{text_prefix(module)}{layer_name}"] = delta
    check(found, updates)


def stems_of_sd15(pipe):
    """As sd-scripts walks the models: LoRA on linear and convolution layers, dots become
    underscores.

    Its CLIP has the level `text_model`; ComfyUI knows the same names.
    """
    stems = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, layer in getattr(pipe, part).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                name = name.removeprefix("text_model.")
                level = "text_model." if part == "text_encoder" else ""
                stems[prefix + name.replace(".", "_")] = f"{part}.{level}{name}"
    return stems


def strengths(file):
    """Stem -> alpha / rank x up x down: what A1111, ComfyUI and sd-scripts add to a weight."""
    state, found = load_file(file), {}
    for key, down in state.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            up, alpha = state[f"{stem}.lora_up.weight"], state[f"{stem}.alpha"].item()
            found[stem] = alpha / len(down) * up.flatten(1) @ down.flatten(1)
    assert len(found) * 3 == len(state)
    return found


def test_sd_scripts_rules_find_every_update_of_sd15(made, bases):
    folder, updates = made["sd15"]
    stems = stems_of_sd15(DiffusionPipeline.from_pretrained(bases["sd15"]))
    check(
        {stems[stem]: product for stem, product in strengths(folder / KOHYA_NAME).items()}, updates
    )


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_comfyuis_rules_find_every_update_in_diffusers_file(made, bases, name):
    """For these it takes `transformer.` and diffusers' module names, CLIP by
    `text_encoder.text_model.`, and, without an alpha beside them, a strength of one."""
    folder, updates = made[name]
    state, pipe = load_file(folder / WEIGHT_NAME), DiffusionPipeline.from_pretrained(bases[name])
    known = {f"transformer.{name}" for name, _ in pipe.transformer.named_parameters()}
    found = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            assert f"{stem}.weight" in known or ".text_model.encoder.layers." in stem
            found[stem] = state[f"{stem}.lora_B.weight"].flatten(1) @ a.flatten(1)
    check(found, updates)


SIDE = 8  # width of the released SD3 in these tests


def released_sd3(blocks):
    """Names and shapes of the model as released, with dual attention in all blocks but the last."""
    shapes = {
        "x_embedder.proj": (SIDE, 4, 2, 2),
        "context_embedder": (SIDE, 6),
        "final_layer.linear": (16, SIDE),
    }
    shapes |= {
        "t_embedder.mlp.0": (SIDE, 4),
        "t_embedder.mlp.2": (SIDE, SIDE),
        "y_embedder.mlp.0": (SIDE, 5),
    }
    shapes |= {"y_embedder.mlp.2": (SIDE, SIDE), "final_layer.adaLN_modulation.1": (2 * SIDE, SIDE)}
    for i in range(blocks):
        last = i == blocks - 1
        for side in ("x", "context"):
            block = f"joint_blocks.{i}.{side}_block"
            shapes[f"{block}.attn.qkv"] = (3 * SIDE, SIDE)
            chunks = (9 if not last else 6) if side == "x" else (2 if last else 6)
            shapes[f"{block}.adaLN_modulation.1"] = (chunks * SIDE, SIDE)
            if side == "x" or not last:
                shapes |= {f"{block}.attn.proj": (SIDE, SIDE), f"{block}.mlp.fc1": (4 * SIDE, SIDE)}
                shapes[f"{block}.mlp.fc2"] = (SIDE, 4 * SIDE)
            if side == "x" and not last:
                shapes |= {
                    f"{block}.attn2.qkv": (3 * SIDE, SIDE),
                    f"{block}.attn2.proj": (SIDE, SIDE),
                }
    return shapes


def released_flux(columns=2):
    """At full width, but for the inputs, which no converter looks at."""
    width, shapes = 3072, {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        shapes |= {
            f"{block}_attn.qkv": 3 * width,
            f"{block}_attn.proj": width,
            f"{block}_mlp.0": 4 * width,
        }
        shapes |= {f"{block}_mlp.2": width, f"{block}_mod.lin": 6 * width}
    shapes |= {"single_blocks.0.linear1": 7 * width, "single_blocks.0.linear2": width}
    shapes |= {"single_blocks.0.modulation.lin": 3 * width, "img_in": width, "txt_in": width}
    shapes |= {
        f"{name}.{half}_layer": width
        for name in ("time_in", "vector_in", "guidance_in")
        for half in ("in", "out")
    }
    shapes |= {"final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * width}
    return {name: (rows, columns) for name, rows in shapes.items()}


NORMS = {
    "sd3": [
        "pos_embed",
        *(f"joint_blocks.0.{s}_block.attn.ln_{x}.weight" for s in ("x", "context") for x in "qk"),
    ],
    "flux": [
        *(
            f"double_blocks.0.{s}_attn.norm.{x}_norm.scale"
            for s in ("img", "txt")
            for x in ("query", "key")
        ),
        *(f"single_blocks.0.norm.{x}_norm.scale" for x in ("query", "key")),
    ],
}
CONVERTERS = {
    "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": convert_flux_transformer_checkpoint_to_diffusers,
}


def converted(shapes, weights, name):
    """Weights of released layers, zero where none is given, as diffusers reads a released
    checkpoint."""
    state = {f"{key}.weight": weights.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    state |= {f"{key}.bias": torch.zeros(shape[0]) for key, shape in shapes.items()}
    state |= {key: torch.zeros(1) for key in NORMS[name]}
    if name == "sd3":
        state |= {
            key.replace(".attn.", ".attn2."): torch.zeros(1)
            for key in NORMS["sd3"]
            if ".x_block.attn." in key
        }
        state |= {
            key.replace("joint_blocks.0", "joint_blocks.1"): torch.zeros(1)
            for key in NORMS["sd3"][1:]
        }
    found = CONVERTERS[name](state)
    return {
        f"transformer.{key.removesuffix('.weight')}": w for key, w in found.items() if w.ndim > 1
    }


def denoiser_names(layers, name):
    return underscored("lora_unet_", released_rows(layers, family_facts(name).kohya))


def random_lora(layers, inputs, seed=0, ranks=(2,)):
    rng = torch.Generator().manual_seed(seed)
    lora = {}
    for i, (name, outputs) in enumerate(layers.items()):
        rank = ranks[i % len(ranks)]
        a = torch.randn((rank, *inputs[name]), generator=rng)
        lora[name] = LoraUpdate(a, torch.randn((outputs, rank, *[1] * (a.ndim - 2)), generator=rng))
    return lora


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_released_models_get_the_updates_that_diffusers_would(name):
    """ComfyUI adds `lora_unet_LAYER` to the layer of the released model; diffusers' converter of
    released checkpoints then says what that is in diffusers' layers."""
    shapes = released_sd3(2) if name == "sd3" else released_flux()
    zeros = converted(shapes, {}, name)
    layers = {key: len(weight) for key, weight in zeros.items()}
    lora = random_lora(layers, {key: weight.shape[1:] for key, weight in zeros.items()})
    state = to_kohya(lora, layers, denoiser_names(layers, name))
    weights = {}
    for key, shape in shapes.items():
        stem = "lora_unet_" + key.replace(".", "_")
        down, up = state.pop(f"{stem}.lora_down.weight"), state.pop(f"{stem}.lora_up.weight")
        weights[key] = (
            state.pop(f"{stem}.alpha") / len(down) * up.flatten(1) @ down.flatten(1)
        ).view(shape)
    assert not state
    found = converted(shapes, weights, name)
    check({key: weight.flatten(1) for key, weight in found.items()}, products(lora))


def test_diffusers_reader_of_sd_scripts_flux_files_finds_every_update_at_full_width():
    zeros = converted(released_flux(), {}, "flux")
    layers = {key: len(w) for key, w in zeros.items() if "blocks." in key and ".norm" not in key}
    lora = random_lora(layers, {key: zeros[key].shape[1:] for key in layers})
    found = _convert_kohya_flux_lora_to_diffusers(
        to_kohya(lora, layers, denoiser_names(layers, "flux"))
    )
    stems = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    check(
        {stem: found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"] for stem in stems},
        products(lora),
    )


@pytest.mark.parametrize("name", ALL)
def test_peft_finds_every_update(made, bases, tmp_path, name):
    folder, updates = made[name]
    family = family_of(bases[name], name)
    peft_format.write(read_lora(folder / WEIGHT_NAME, family), family, tmp_path, {})
    pipe, found = DiffusionPipeline.from_pretrained(bases[name]), {}
    for part in dict.fromkeys(key.partition(".")[0] for key in updates):
        module = getattr(pipe, part)
        prefix = f"{part}.{text_prefix(module)}"
        peft = PeftModel.from_pretrained(module, tmp_path / part)
        for layer_name, layer in peft.base_model.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                found[prefix + layer_name] = layer.get_delta_weight("default").detach().flatten(1)
    check(found, updates)
    check(products(read_lora(tmp_path, family)), updates)


def test_a_path_where_nothing_is_is_the_users_mistake(bases, tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_lora(tmp_path / "absent", family_of(bases["sd15"], "sd15"))


def test_a_new_format_is_a_module_and_a_row(bases, tmp_path, monkeypatch):
    """Its module need not lie in the package."""
    family = family_of(bases["sd15"], "sd15")
    layer = "unet.down_blocks.0.attentions.0.proj_in"
    module = SimpleNamespace(layer_names=lambda family: {"anything": Rows((layer,))})
    monkeypatch.setitem(sys.modules, "new_format", module)
    monkeypatch.setitem(READ_FORMATS, "new", "new_format")
    state = {"anything.lora_A": torch.ones(1, 8, 1, 1), "anything.lora_B": torch.ones(8, 1, 1, 1)}
    save_file(state, tmp_path / "file.safetensors")
    found = read_lora(tmp_path / "file.safetensors", family)
    assert found.keys() == {layer}
    assert torch.equal(found[layer].delta_weight(), torch.ones(8, 8))


# Round trips


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(2,), (1, 3, 2)], ids=["one rank", "several"])
@pytest.mark.parametrize("wanted", ["", "to_q", "to_v", "mlp", "ff"])
def test_kohya_and_back_is_exact_with_whole_and_with_partly_trained_layers(
    bases, tmp_path, name, ranks, wanted
):
    family = family_of(bases[name], name)
    shapes = adaptable_shapes(family)
    chosen = {key: shape for key, shape in shapes.items() if wanted in key}
    lora = random_lora(
        {key: shape[0] for key, shape in chosen.items()},
        {key: shape[1:] for key, shape in chosen.items()},
        ranks=ranks,
    )
    kohya.write(lora, family, tmp_path / KOHYA_NAME, {})
    back = read_lora(tmp_path / KOHYA_NAME, family)
    assert back.keys() == lora.keys()
    for key, update in lora.items():
        assert torch.equal(back[key].a, update.a)
        assert torch.equal(back[key].b, update.b)


def test_layers_that_share_their_first_half_stay_as_small_as_they_were():
    layers = {f"transformer.transformer_blocks.0.attn.to_{x}": 4 for x in "qkv"}
    a = torch.randn(2, 3)
    lora = {name: LoraUpdate(a, torch.randn(4, 2)) for name in layers}
    state = to_kohya(lora, layers, denoiser_names(layers, "flux"))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert state[f"{stem}.lora_down.weight"].shape == (2, 3)
    whole = LoraUpdate(state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"])
    back = dict(zip(layers, split_update(whole, list(layers.values())), strict=True))
    assert max_relative_difference(lora, back) == 0


@pytest.mark.parametrize("name", ALL)
def test_no_two_layers_share_a_name_and_none_is_left_out(bases, name):
    family = family_of(bases[name], name)
    layers = adaptable_layers(family)
    parts = [part for rows in kohya.written_names(family, layers).values() for part in rows.layers]
    assert len(parts) == len(set(parts))
    assert layers.keys() <= set(parts)
    assert swapped_layers(layers, family_facts(name).kohya) <= layers.keys() | {""}


@pytest.mark.parametrize("alpha", ["metadata", "beside"])
def test_a_scale_is_read_where_others_write_it(made, bases, tmp_path, alpha):
    """diffusers keeps alpha in the header, others in a tensor NAME.alpha."""
    folder, updates = made["sd3"]
    state, metadata = load_file(folder / WEIGHT_NAME), {"format": "pt"}
    stems = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    if alpha == "beside":
        state |= {f"{stem}.alpha": torch.tensor(3.0) for stem in stems}
    else:
        metadata["lora_adapter_metadata"] = json.dumps(
            {
                f"{part}.{key}": value
                for part in (*FAMILIES["sd3"].clip_encoders, "transformer")
                for key, value in {"r": 2, "lora_alpha": 3}.items()
            }
        )
    save_file(state, tmp_path / "file.safetensors", metadata)
    found = products(read_lora(tmp_path / "file.safetensors", family_of(bases["sd3"], "sd3")))
    check(found, {name: 1.5 * product for name, product in updates.items()})


def test_kohyas_alpha_is_read(made, bases, tmp_path):
    folder, updates = made["sd15"]
    state = load_file(folder / KOHYA_NAME)
    state |= {key: 3 * value for key, value in state.items() if key.endswith(".alpha")}
    save_file(state, tmp_path / "file.safetensors")
    found = products(read_lora(tmp_path / "file.safetensors", family_of(bases["sd15"], "sd15")))
    check(found, {name: 3 * product for name, product in updates.items()})


def test_layers_of_several_ranks_keep_theirs_in_diffusers_and_peft(bases, tmp_path):
    family = family_of(bases["sd3"], "sd3")
    family.load("transformer")
    weights = {
        f"transformer.{n}": m.weight
        for n, m in family.denoiser.named_modules()
        if isinstance(m, nn.Linear)
    }
    layers = {name: len(weight) for name, weight in weights.items()}
    lora = random_lora(
        layers, {name: weight.shape[1:] for name, weight in weights.items()}, ranks=(1, 3, 2)
    )
    diffusers_format.write(lora, family, tmp_path / WEIGHT_NAME, {})
    peft_format.write(lora, family, tmp_path, {})
    peft = PeftModel.from_pretrained(
        DiffusionPipeline.from_pretrained(bases["sd3"]).transformer, tmp_path / "transformer"
    )
    family.pipe.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    for module in (peft.base_model.model, family.denoiser):
        found = {}
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                (adapter,) = layer.active_adapters
                found[f"transformer.{name}"] = layer.get_delta_weight(adapter).detach()
        check(found, products(lora))


# What does not fit


def test_a_file_for_another_model_is_an_error_that_says_so(made, bases):
    family = family_of(bases["sd15"], "sd15")
    text = r"\d+ of \d+ tensors are of layers that are not in this base.*names are of Flux.1"
    with pytest.raises(UserError, match=text):
        read_lora(made["flux"][0] / WEIGHT_NAME, family)
    with pytest.raises(UserError, match=r"such names are of SD3 or SD3.5.*|.*another model"):
        read_lora(made["sd3"][0] / KOHYA_NAME, family)


def test_a_run_that_has_not_finished_has_no_lora_yet_and_is_told_so(bases, tmp_path):
    with pytest.raises(
        UserError, match=r"there is no LoRA in it\. A run writes its LoRA when it finishes"
    ):
        read_lora(tmp_path, family_of(bases["sd15"], "sd15"))


# What the files tell of themselves


def test_the_headers_say_what_the_specifications_ask(made):
    for name, architecture in (("sd15", "stable-diffusion-v1"), ("flux", "flux-1-dev")):
        for file in (WEIGHT_NAME, KOHYA_NAME):
            with safe_open(made[name][0] / file, "pt") as opened:
                header = opened.metadata()
            assert header["modelspec.architecture"] == f"{architecture}/lora"
            assert header["modelspec.resolution"] == "16x16"
            config = json.loads(header["diffusion_trainers.config"])
            assert config["lora"]["rank"] == 2
            assert config["data"]["instance_prompt"] == "a b c"
            assert "torch" in json.loads(header["diffusion_trainers.versions"])


def test_kohyas_hash_is_of_the_tensors_alone(made):
    """Changing what the header says does not change it; changing a tensor does."""
    path = made["sd15"][0] / KOHYA_NAME
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    assert header["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "2"


# Ranks


def test_a_lower_rank_is_the_nearest_and_its_error_is_told():
    lora = random_lora({"a": 12, "b": 7}, {"a": (9,), "b": (5, 3, 3)}, ranks=(6, 4))
    lora["b"] = LoraUpdate(
        lora["b"].a, lora["b"].b[..., None, None] if lora["b"].b.ndim == 2 else lora["b"].b
    )
    small, message = reduce_rank(lora, 2)
    lost = whole = 0
    for name, update in lora.items():
        product = update.delta_weight().numpy().astype(float)
        u, s, v = np.linalg.svd(product, full_matrices=False)
        np.testing.assert_allclose(
            small[name].delta_weight().numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5
        )
        assert small[name].rank == 2
        assert small[name].a.shape[1:] == update.a.shape[1:]
        lost += (s[2:] ** 2).sum()
        whole += (s**2).sum()
    assert message == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    same, nothing = reduce_rank(lora, 16)
    assert nothing == pytest.approx(0, abs=1e-12)
    assert max_relative_difference(lora, same) < 1e-5


def test_the_difference_of_two_models_is_what_was_added():
    rng = torch.Generator().manual_seed(0)
    base = {
        "linear": torch.randn(8, 6, generator=rng),
        "conv": torch.randn(8, 4, 3, 3, generator=rng),
    }
    base["same"] = torch.ones(2, 2)
    lora = random_lora({"linear": 8, "conv": 8}, {"linear": (6,), "conv": (4, 3, 3)}, ranks=(2,))
    tuned = {
        name: weight + lora[name].delta_weight().view_as(weight)
        for name, weight in base.items()
        if name in lora
    }
    found, message = lora_from_difference(base, base | tuned, 2)
    assert found.keys() == lora.keys()
    assert max_relative_difference(lora, found) < 1e-5
    assert message < 1e-5
    assert found["conv"].a.shape == (2, 4, 3, 3)
    assert found["conv"].b.shape == (8, 2, 1, 1)
    _, much = lora_from_difference(base, base | tuned, 1)
    assert 0.1 < much < 1


# The script


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("name", ALL)
def test_merged_weights_need_no_lora_and_are_the_same_model(
    made, bases, tmp_path, monkeypatch, capsys, name
):
    folder, _ = made[name]
    call(
        monkeypatch,
        folder / WEIGHT_NAME,
        "--base",
        bases[name],
        "--format",
        "merged",
        "--out",
        tmp_path / "merged",
    )
    assert "costs" in capsys.readouterr().out
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    fused = DiffusionPipeline.from_pretrained(bases[name])
    fused.load_lora_weights(folder, weight_name=WEIGHT_NAME)
    for part in (family_of(bases[name], name).denoiser_name, *FAMILIES[name].clip_encoders):
        state = getattr(merged, part).state_dict()
        for layer_name, layer in getattr(fused, part).named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                torch.testing.assert_close(
                    state[f"{layer_name}.weight"], layer.base_layer.weight.data
                )


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("name", ALL)
def test_the_script_writes_what_the_reader_reads(
    made, bases, tmp_path, monkeypatch, capsys, name, form
):
    folder, updates = made[name]
    out = tmp_path / f"out{'' if form == 'peft' else '.safetensors'}"
    call(monkeypatch, folder / KOHYA_NAME, "--base", bases[name], "--format", form, "--out", out)
    assert f"{len(updates)} layers; read back, they differ by at most" in capsys.readouterr().out
    check(products(read_lora(out, family_of(bases[name], name))), updates)


def test_the_script_tells_the_error_of_a_lower_rank(made, bases, tmp_path, monkeypatch, capsys):
    folder, updates = made["sd15"]
    out = tmp_path / "small.safetensors"
    call(monkeypatch, folder / WEIGHT_NAME, "--base", bases["sd15"], "--rank", 1, "--out", out)
    message = float(capsys.readouterr().out.split("error of the updates ")[1].split()[0])
    found = products(read_lora(out, family_of(bases["sd15"], "sd15")))
    lost = sum((found[name] - product).square().sum() for name, product in updates.items())
    whole = sum(product.square().sum() for product in updates.values())
    assert message == pytest.approx(float((lost / whole) ** 0.5), rel=0.01)
    assert message > 0.05


def test_a_tuned_pipeline_gives_back_the_lora_that_was_merged_into_it(
    made, bases, tmp_path, monkeypatch
):
    folder, updates = made["flux"]
    base = bases["flux"]
    call(
        monkeypatch,
        folder / WEIGHT_NAME,
        "--base",
        base,
        "--format",
        "merged",
        "--out",
        tmp_path / "tuned",
    )
    call(
        monkeypatch,
        tmp_path / "tuned",
        "--base",
        base,
        "--rank",
        2,
        "--out",
        tmp_path / "back.safetensors",
    )
    check(
        products(read_lora(tmp_path / "back.safetensors", family_of(base, "flux"))), updates, 1e-3
    )


@pytest.mark.parametrize("name", ALL)
def test_a_kohya_file_on_a_pipeline_is_the_diffusers_file(made, bases, name):
    folder, _ = made[name]
    states = []
    for file in (WEIGHT_NAME, KOHYA_NAME):
        family = family_of(bases[name], name)
        family.load(family.denoiser_name, *family.clip_encoders)
        load_lora(family, folder / file)
        states.append(to_products(family))
    check(states[1], states[0])


def test_a_peft_folder_on_a_pipeline_is_the_diffusers_file(made, bases, tmp_path):
    folder, _ = made["sd15"]
    family = family_of(bases["sd15"], "sd15")
    peft_format.write(read_lora(folder / WEIGHT_NAME, family), family, tmp_path, {})
    states = []
    for place in (folder / WEIGHT_NAME, tmp_path):
        family = family_of(bases["sd15"], "sd15")
        family.load(family.denoiser_name, *family.clip_encoders)
        load_lora(family, place)
        states.append(to_products(family))
    check(states[1], states[0])


def test_a_difference_merged_again_goes_into_the_base(made, bases, tmp_path, monkeypatch):
    """Not into the tuned pipeline that it was taken from."""
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    call(
        monkeypatch,
        made["sd15"][0] / WEIGHT_NAME,
        "--base",
        bases["sd15"],
        "--format",
        "merged",
        "--out",
        tuned,
    )
    call(
        monkeypatch,
        tuned,
        "--base",
        bases["sd15"],
        "--rank",
        2,
        "--format",
        "merged",
        "--out",
        again,
    )
    states = [
        DiffusionPipeline.from_pretrained(place).unet.state_dict() for place in (tuned, again)
    ]
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=1e-3, atol=1e-3)


def to_products(family):
    found = {}
    for part in (family.denoiser_name, *family.clip_encoders):
        for name, layer in getattr(family.pipe, part).named_modules():
            if isinstance(layer, BaseTunerLayer):
                (adapter,) = layer.active_adapters
                found[f"{part}.{name}"] = layer.get_delta_weight(adapter).detach().flatten(1)
    return found
