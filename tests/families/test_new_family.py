"""A family that is added in one place goes all the way: its class and its facts are this file."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from trainers import dreambooth
from trainers.config import family_facts as facts_module
from trainers.config.family_facts import family_facts, family_names
from trainers.families import FAMILIES, Family
from trainers.families.base import CLASSES
from trainers.families.objectives import DDPM
from trainers.lora.layers import add_lora
from trainers.run import run
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

NAME = __name__.rpartition(".")[2]
FACTS = """
title: Made up
pixel_multiple: 8
text_encoders: {text_encoder: {lora: true}}
blocks: [up_blocks]
lora_targets: {attention: [to_q, to_v], mlp: [ff.net.2]}
config_keys: {objective: [snr_gamma]}
architecture: {made-up: {}}
licenses: {}
kohya:
  prefixes: {unet: lora_unet_, text_encoder: lora_te_}
  by_default: true
  base_model_version: made_up
  network_module: networks.lora
"""


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """The family, as if its two files were among the others."""
    shutil.copytree(facts_module.FOLDER, tmp_path / "families")
    (tmp_path / "families" / f"{NAME}.yaml").write_text(FACTS)
    monkeypatch.setattr(facts_module, "FOLDER", tmp_path / "families")
    family_names.cache_clear()
    try:
        yield make_family()
    finally:
        CLASSES.pop(NAME, None)
        family_names.cache_clear()
        family_facts.cache_clear()


def make_family():
    class MadeUp(Family):
        pipeline = StableDiffusionPipeline
        denoiser_name = "unet"
        probe_time = 500

        def make_objective(self, config, latent_size):
            return DDPM(self.pipe.scheduler.alphas_cumprod, snr_gamma=config.snr_gamma)

        def encode_text(self, name, ids):
            return {name: self.pipe.text_encoder(ids)[0]}

        def condition(self, text):
            return {"encoder_hidden_states": text["text_encoder"]}

        def predict(self, denoiser, x_t, t, condition):
            return denoiser(x_t, t, **condition, return_dict=False)[0]

    return MadeUp


@pytest.fixture
def config(settings, made_up):
    """Of a short run of the family; the type of `model.family` lists those of the package alone."""
    plain = settings("objective.snr_gamma=5")
    return plain.model_copy(update={"model": plain.model.model_copy(update={"family": NAME})})


def test_it_is_found_by_its_name(made_up):
    assert NAME in FAMILIES
    assert FAMILIES[NAME] is made_up
    assert made_up.clip_encoders == ("text_encoder",)
    assert made_up.long_encoder is None


def test_keys_that_it_does_not_understand_are_refused(config):
    refused = dict(
        config.model_copy(update={"objective": type(config.objective)(debiased=True)}).errors()
    )
    assert refused.keys() == {"objective.debiased"}
    assert not dict(config.errors())


def test_it_predicts_what_its_pipeline_computes(config):
    family = FAMILIES[NAME](config.model)
    family.load("unet", "text_encoder")
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    text = family.encode_prompt("text_encoder", "a b c")
    text = {name: value.expand(2, *value.shape) for name, value in text.items()}
    ours = family.denoise(family.denoiser, x_t, t, text)
    theirs = family.pipe.unet(x_t, t, text["text_encoder"]).sample
    torch.testing.assert_close(ours, theirs)
    add_lora(family, config.lora, ["text_encoder"])
    adapted = [name for name, p in family.denoiser.named_parameters() if p.requires_grad]
    assert adapted
    assert all(name.startswith("up_blocks.") for name in adapted)
    torch.testing.assert_close(family.denoise(family.denoiser, x_t, t, text), theirs)


def test_a_run_trains_it_and_proves_its_files(config):
    run(config)
    for name in (WEIGHT_NAME, KOHYA_NAME):
        assert load_file(config.output_dir / name)
    card = (config.output_dir / "README.md").read_text()
    assert "differs by" in card


def test_its_batches_are_those_of_any_family(config):
    _, batches, _ = dreambooth.build(config, Accelerator(cpu=True))
    (batch, _), *_ = batches(0)
    assert batch["moments"].shape[1:] == (8, 8, 8)
