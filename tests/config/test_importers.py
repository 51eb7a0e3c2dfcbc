"""Configs of other trainers: what each key becomes, what is left over, and the first step."""

import pytest
import yaml

from tests.shared.processes import ROOT, call
from trainers.config import loading
from trainers.config.family_facts import families_with
from trainers.config.importers import import_config
from trainers.config.importers.ai_toolkit import read_prior, read_prompts
from trainers.config.importers.base import ForeignConfig
from trainers.errors import UserError
from trainers.run import run

FILES = ROOT / "tests/shared/foreign_configs"
EXPECTED = {
    "sd_scripts.toml": {
        "output_dir": "./out/dog",
        "model.family": "sd15",
        "model.clip_chunks": 3,
        "data.caption_prefix": "photo,",
        "data.caption_lines": "choose",
        "data.shuffle_tags": True,
        "data.keep_tags": 1,
        "data.tag_dropout": 0.1,
        "lora.rank": 32,
        "lora.alpha": 16,
        "data.resolution": 512,
        "data.buckets": True,
        "objective.snr_gamma": 5,
        "optimizer.name": "adamw_8bit",
        "optimizer.learning_rate": 1e-4,
        "optimizer.lr_warmup_steps": 120,
        "optimizer.lr_num_cycles": 3,
        "train.mixed_precision": "bf16",
        "train.train_batch_size": 2,
    },
    "ai_toolkit.yaml": {
        "output_dir": "output/my_lora",
        "model.family": "flux",
        "model.quantization": "int8",
        "lora.alpha": 8,
        "data.trigger": "p3r5on",
        "data.instance_prompt": "[trigger]",
        "data.shuffle_tags": True,
        "data.keep_tags": 2,
        "data.tag_dropout": 0.2,
        "data.resolution": [512, 768, 1024],
        "data.caption_dropout": 0.05,
        "train.ema_decay": 0.99,
        "validation.prompts": ["[trigger] in a cafe", "a bear builds a cabin"],
        "checkpoint.checkpoints_total_limit": 4,
    },
    "simpletuner.json": {
        "model.family": "sd3",
        "data.instance_data_dir": "/photos",
        "data.instance_prompt": "a b c",
        "data.caption_prefix": "a b c",
        "data.caption_lines": "choose",
        "data.shuffle_tags": True,
        "data.keep_tags": 1,
        "data.caption_variants": 3,
        "data.resolution": 1024,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-4,
        "optimizer.lr_scheduler": "polynomial",
        "validation.guidance_scale": 3,
        "validation.num_inference_steps": 20,
    },
    "onetrainer.json": {
        "output_dir": "models/lora",
        "model.family": "flux",
        "model.quantization": "nf4",
        "lora.alpha": 1,
        "data.instance_data_dir": "/photos",
        "data.mask_dir": "/photos",
        "data.caption_lines": "choose",
        "data.shuffle_tags": True,
        "data.keep_tags": 1,
        "data.tag_dropout": 0.3,
        "objective.density": "logit_normal",
        "optimizer.lr_scheduler": "constant_with_warmup",
        "optimizer.lr_warmup_steps": 200,
        "train.mixed_precision": "bf16",
    },
    "diffusers_flux.sh": {
        "output_dir": "trained-flux-lora",
        "model.family": "flux",
        "model.guidance_scale": 1,
        "lora.rank": 4,
        "lora.alpha": 4,
        "data.instance_prompt": "a photo of sks dog",
        "data.center_crop": False,
        "objective.density": "logit_normal",
        "optimizer.name": "adamw_8bit",
        "train.gradient_accumulation_steps": 4,
    },
}
LEFT_OVER = {
    "sd_scripts.toml": set(),
    "ai_toolkit.yaml": set(),
    "simpletuner.json": set(),
    "onetrainer.json": set(),
    "diffusers_flux.sh": set(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_key_becomes_ours_and_what_has_no_equal_is_listed(name):
    imported = import_config(FILES / name)
    found = {path: imported.value(path) for path in EXPECTED[name]}
    assert found == EXPECTED[name]
    assert set(imported.leftovers()) == LEFT_OVER[name]
    text = imported.to_yaml()
    assert yaml.safe_load(text) == imported.tree()
    assert all(f"#   {key}: " in text for key in LEFT_OVER[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_result_trains(name, bases, photos, tmp_path):
    imported = import_config(FILES / name)
    file = tmp_path / "imported.yaml"
    file.write_text(imported.to_yaml())
    family = imported.value("model.family")
    overrides = [
        f"output_dir={tmp_path}/run",
        f"model.pretrained_model_name_or_path={bases[family]}",
        f"data.instance_data_dir={photos}",
        "data.instance_prompt=a b c",
        "data.mask_dir=null",
        "data.resolution=16",
        "model.quantization=none",
        "optimizer.name=adamw",
        "train.max_train_steps=1",
        "train.mixed_precision=no",
        "validation.num_inference_steps=1",
        "tracking.report_to=[]",
    ]
    if family in families_with("model", "max_sequence_length"):
        overrides.append("model.max_sequence_length=10")
    run(loading.load_config(file, overrides))
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


SDXL = {
    "a.toml": 'network_module = "networks.lora"\nsdxl = true\nnetwork_dim = 4\nunet_lr = 1e-4',
    "a.yaml": "job: x\nconfig: {process: [{model: {arch: sdxl}, datasets: [{folder_path: x}]}]}",
    "b.yaml": "job: x\nconfig: {process: [{model: {is_xl: true}, datasets: [{folder_path: x}]}]}",
    "a.sh": "accelerate launch train_dreambooth_lora_sdxl.py --rank 4",
}


@pytest.mark.parametrize("name", SDXL)
def test_what_each_of_them_calls_sdxl_is_that_family(tmp_path, name):
    (tmp_path / name).write_text(SDXL[name])
    imported = import_config(tmp_path / name)
    assert imported.value("model.family") == "sdxl"
    assert not {"sdxl", "model.is_xl"} & imported.leftovers().keys()


def test_a_module_of_several_families_is_asked_about(tmp_path):
    (tmp_path / "a.toml").write_text(SDXL["a.toml"].replace("sdxl = true", ""))
    assert (
        "It is that of SD1.5 and SDXL: is it this one?"
        in import_config(tmp_path / "a.toml").to_yaml()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "cannot be parsed"),
        ("a.json", b"[1]", "has no keys"),
        ("a.yaml", b"a: 1", "none of the configs that can be imported"),
        ("a.toml", b"\xff\xfe", "is not text"),
        ("a.yaml", b"x" * (2**20 + 1), "larger than 1 MiB"),
        (
            "a.sh",
            b"accelerate launch train_dreambooth_lora_lumina2.py --rank 4",
            "not supported here",
        ),
        ("a.sh", b"python train_dreambooth_lora_flux.py --prompt 'a", "cannot be parsed"),
        ("a.yaml", b"job: x\nconfig: {process: []}", "config.process"),
        ("a.yaml", b"job: x\nconfig: {process: [{datasets: [{}]}, {}]}", "2 parts"),
    ],
)
def test_what_cannot_be_imported_is_one_message(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_config(file)


def test_the_script_prints_or_writes_the_config_and_what_is_still_wrong(tmp_path, capsys):
    out = tmp_path / "ours.yaml"
    assert call("import_config.py", FILES / "sd_scripts.toml") == 0
    printed = capsys.readouterr()
    assert "still to mend: data.instance_data_dir: no such folder" in printed.err
    assert call("import_config.py", FILES / "sd_scripts.toml", "--out", out) == 0
    assert out.read_text() == printed.out
    assert call("import_config.py", FILES / "sd_scripts.toml", "--out", out) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_prompt_of_ai_toolkit_keeps_its_own_settings():
    samples = [
        {"prompt": "a cat", "neg": "dogs", "width": 512, "network_multiplier": "0.5", "walk": 3},
        {"prompt": "plain"},
    ]
    config = ForeignConfig("ai-toolkit", {"sample": {"samples": samples}})
    read_prompts(config)
    own = {"prompt": "a cat", "negative_prompt": "dogs", "width": 512, "lora_scale": 0.5}
    assert config.value("validation.prompts") == [own, "plain"]
    assert config.leftovers() == {"sample.samples 1: walk": 3}


def test_output_preservation_of_ai_toolkit_is_ours_for_one_subject_without_class_pictures():
    train = {
        "diff_output_preservation": True,
        "diff_output_preservation_multiplier": 0.8,
        "diff_output_preservation_class": "dog",
    }
    config = ForeignConfig("ai-toolkit", {"train": train})
    read_prior(config)
    found = [config.value(f"data.{key}") for key in ("prior", "class_prompt", "prior_loss_weight")]
    assert found == ["output_preservation", "a photo of a dog", 0.8]
    assert not config.leftovers()
    off = ForeignConfig("ai-toolkit", {"train": train | {"diff_output_preservation": False}})
    read_prior(off)
    assert not off.settings
    assert not off.leftovers()
    several = ForeignConfig("ai-toolkit", {"train": train})
    several.put("data.concepts", [{}], "datasets")
    read_prior(several)
    assert several.leftovers().keys() == {f"train.{key}" for key in train}
