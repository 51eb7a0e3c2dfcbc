"""A base in one file trains as its folder does, to the bit, and what is no base is refused."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.runs import assert_same
from tests.shared.single_files import base_of, single_file
from trainers import memory_plan
from trainers.config import ModelConfig
from trainers.config.dreambooth_rules import base_problem
from trainers.config.family_facts import family_facts, family_names
from trainers.errors import UserError
from trainers.families import FAMILIES, detect_family
from trainers.original import convert, weights
from trainers.original.checkpoint import read_checkpoint
from trainers.original.settings import default_settings
from trainers.run import run

ALL = ("sd15", "sdxl", "sd3", "flux")


def folder_of(name, path, settings):
    """The folder that a file is converted to."""
    where = {"pretrained_model_name_or_path": str(path), "config": str(settings)}
    return convert.diffusers_folder(ModelConfig(family=name, **where))


def assert_same_weights(folder, pipe):
    loaded = DiffusionPipeline.from_pretrained(folder)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            state, wanted = getattr(loaded, part).state_dict(), module.state_dict()
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[key], wanted[key]) for key in wanted), part


@pytest.mark.parametrize("name", by_hand_but(EACH_TIME, ALL))
def test_a_file_trains_as_its_folder_to_the_bit(settings, files, tmp_path, name):
    path, folder, _ = files[name]
    short = ("train.max_train_steps=2", "train.train_text_encoder=true")
    whole = settings(*base_of(folder), *short, f"output_dir={tmp_path}/folder", family=name)
    one = settings(*base_of(path, folder), *short, f"output_dir={tmp_path}/file", family=name)
    run(whole)
    run(one)
    assert_same(whole, one)


@pytest.mark.parametrize("name", ALL)
def test_the_weights_are_those_of_the_file(files, name):
    path, settings, pipe = files[name]
    assert detect_family(str(path)) == name
    assert_same_weights(folder_of(name, path, settings), pipe)


def test_a_file_is_converted_once_and_another_one_anew(files, tmp_path, monkeypatch):
    path, settings, _ = files["sdxl"]
    first = folder_of("sdxl", path, settings)
    changed = load_file(path)
    changed["model.diffusion_model.out.2.bias"] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    assert folder_of("sdxl", tmp_path / "changed.safetensors", settings) != first
    monkeypatch.setattr(convert, "write_folder", lambda *_: pytest.fail("converted twice"))
    assert folder_of("sdxl", path, settings) == first


def test_large_parts_are_several_files(files, monkeypatch, tmp_path):
    path, settings, pipe = files["flux"]
    monkeypatch.setenv("DIFFUSION_TRAINERS_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "MAX_SHARD", 2**16)
    folder = folder_of("flux", path, settings)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert_same_weights(folder, pipe)


@pytest.mark.parametrize("name", ALL)
def test_what_a_file_lacks_comes_from_the_folder_that_is_named(tmp_path, name):
    """As most files of SD3.5 and Flux.1 are: the transformer alone, without a prefix."""
    encoders = list(family_facts(name).text_encoders)
    pipe, settings = single_file(name, tmp_path / "x.safetensors", leave_out=("vae", *encoders))
    state = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in load_file(tmp_path / "x.safetensors").items()
    }
    save_file(state, tmp_path / "bare.safetensors")
    for file in ("x", "bare"):
        assert_same_weights(folder_of(name, tmp_path / f"{file}.safetensors", settings), pipe)
    for weights_file in (settings / "vae").glob("*.safetensors"):
        weights_file.unlink()
    with pytest.raises(UserError, match=r"has no vae, and .* no weights of one"):
        folder_of(name, tmp_path / "x.safetensors", settings)


def test_a_t5_that_was_left_out_is_there_when_it_is_wanted(files, recwarn):
    path, settings, pipe = files["sd3"]
    where = {"pretrained_model_name_or_path": str(path), "config": str(settings)}
    without = convert.diffusers_folder(ModelConfig(family="sd3", **where, text_encoder_3=None))
    assert not list(without.glob("text_encoder_3/*.safetensors"))
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]
    assert_same_weights(folder_of("sd3", path, settings), pipe)


def test_a_clip_without_a_projection_projects_nothing(files, tmp_path):
    path, settings, pipe = files["sd3"]
    state = load_file(path)
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    save_file(state, tmp_path / "x.safetensors")
    assert_same_weights(folder_of("sd3", tmp_path / "x.safetensors", settings), pipe)


def test_an_autoencoder_is_found_by_either_name(files, tmp_path):
    path, settings, pipe = files["sdxl"]
    state = {
        key.replace("first_stage_model.", "vae."): value for key, value in load_file(path).items()
    }
    save_file(state, tmp_path / "x.safetensors")
    assert_same_weights(folder_of("sdxl", tmp_path / "x.safetensors", settings), pipe)


def test_a_file_says_that_it_predicts_v_to_pure_noise(settings, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    _, folder = single_file("sdxl", tmp_path / "v.safetensors", **marks)
    config = settings(*base_of(tmp_path / "v.safetensors", folder), family="sdxl")
    family = FAMILIES["sdxl"](config.model)
    family.load()
    objective = family.make_objective(config.objective, (8, 8))
    assert objective.prediction_type == "v_prediction"
    assert objective.abar[-1] < 1e-6
    assert family.pipe.scheduler.config.timestep_spacing == "trailing"


def test_weights_of_eight_bits_are_the_same_numbers(files, tmp_path):
    path, settings, pipe = files["sd15"]
    state = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(path).items()}
    save_file(state, tmp_path / "x.safetensors")
    folder = folder_of("sd15", tmp_path / "x.safetensors", settings)
    loaded = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(loaded[key], value.to(torch.float8_e4m3fn).float())


def test_tensors_of_nothing_are_named_and_usual_extras_are_not(files, tmp_path, recwarn):
    path, settings, _ = files["sd15"]
    extras = {"alphas_cumprod": torch.ones(1), "model_ema.decay": torch.ones(1)}
    extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.ones(1)
    save_file(load_file(path) | extras, tmp_path / "a.safetensors")
    folder_of("sd15", tmp_path / "a.safetensors", settings)
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]
    save_file(load_file(path) | {"model.of_mine": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors are of no part .*model\.of_mine"):
        folder_of("sd15", tmp_path / "b.safetensors", settings)


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UNET}out.2.bias": None}, r"1 of 208 tensors of the unet are not in it.*out\.2\.bias"),
        ({f"{UNET}out.2.bias": torch.ones(9)}, r"out\.2\.bias has the shape \[9\]"),
        ({f"{UNET}out.2.scale_weight": torch.ones(1)}, "weights are quantized"),
        ({"edm_mean": torch.ones(1)}, "other noise levels"),
        ({f"{UNET}input_blocks.1.1.proj_in.weight": None}, "This file is none of these"),
    ],
)
def test_a_file_that_is_no_whole_base_is_refused(files, tmp_path, change, message):
    path, settings, _ = files["sd15"]
    state = load_file(path) | change
    state = {key: value for key, value in state.items() if value is not None}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        folder_of("sd15", tmp_path / "x.safetensors", settings)


def test_a_lora_is_no_base(made):
    with pytest.raises(UserError, match=r"a LoRA, for which there is lora\.init_from"):
        read_checkpoint(made["sd15"][0] / "pytorch_lora_weights.safetensors")


def test_another_family_is_told(settings, files):
    path, folder, _ = files["sdxl"]
    config = settings(*base_of(path, folder), family="sd15")
    with pytest.raises(UserError, match=r"a file of SDXL.*set model\.family=sdxl"):
        run(config)


def test_without_the_hub_the_folder_that_is_needed_is_told(files):
    path, _, _ = files["sd15"]
    model = ModelConfig(family="sd15", pretrained_model_name_or_path=str(path))
    with pytest.raises(
        UserError, match=r"stable-diffusion-v1-5.*Set model\.config .*--base-config\)"
    ):
        convert.diffusers_folder(model)


def test_the_settings_are_those_of_the_release_that_a_file_is_of(files):
    found = {name: default_settings(read_checkpoint(files[name][0])[1]) for name in ALL}
    assert found == {
        "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "sd3": "stabilityai/stable-diffusion-3.5-medium",
        "flux": "black-forest-labs/FLUX.1-dev",
    }
    facts = map(family_facts, family_names())
    assert all(own.single_file.settings[""] for own in facts if own.single_file)


@pytest.mark.parametrize("name", ["x.ckpt", "a/b.gguf", "x.pt"])
def test_files_that_are_not_opened(name):
    assert "is a file that is not opened" in base_problem(name)


@pytest.mark.parametrize("key", ["model.revision=main", "model.variant=fp16"])
def test_keys_of_repositories_mean_nothing_for_a_file(settings, files, key):
    path, folder, _ = files["sd15"]
    with pytest.raises(UserError, match="is for repositories and folders"):
        settings(*base_of(path, folder), key)
    with pytest.raises(UserError, match=r"model\.config: is for a base in one file"):
        settings(*base_of(folder, folder))


def test_a_run_is_planned_of_the_settings_alone(settings, files, monkeypatch):
    path, folder, _ = files["sdxl"]
    monkeypatch.setattr(convert, "write_folder", lambda *_: pytest.fail("weights are read"))
    config = settings(*base_of(path, folder), family="sdxl")
    assert memory_plan.download_configs(config.model) == folder


def test_the_index_names_no_part_that_is_not_there(files, tmp_path):
    path, settings, _ = files["sd15"]
    index = json.loads((settings / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "settings").mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / "settings" / part).symlink_to(settings / part)
    (tmp_path / "settings" / "model_index.json").write_text(json.dumps(index))
    folder = folder_of("sd15", path, tmp_path / "settings")
    assert DiffusionPipeline.from_pretrained(folder).safety_checker is None
