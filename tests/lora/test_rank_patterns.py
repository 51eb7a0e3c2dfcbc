"""Layers of another rank or alpha: those that PEFT's patterns name, in files as in training."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.shared.families import whole
from trainers import dreambooth
from trainers.banners import describe_weights
from trainers.config import DreamBoothConfig, LoraConfig, loading
from trainers.errors import UserError
from trainers.lora import peft_format
from trainers.lora.files import read_lora
from trainers.lora.initial import adapted_layers
from trainers.lora.layers import add_lora
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME
from trainers.training.facts import config_facts

PATTERNS = (
    "lora.rank_pattern={to_k: 3, '.*to_[kv]': 4, to_out.0: 1}",
    "lora.alpha_pattern={to_v: 8.5}",
)


@pytest.fixture
def build(settings):
    """A function: family, overrides -> its task, nothing of whose LoRA is zero."""

    def make(family, *overrides):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = settings(*PATTERNS, *overrides, family=family)
        task = dreambooth.build(config, Accelerator(cpu=True))[0]
        torch.manual_seed(0)
        for module in task.module.modules():
            if isinstance(module, LoraLayer):
                nn.init.normal_(module.lora_B["default"].weight)
        return task

    return make


def strengths(module):
    """Rank and scale of each layer."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}
    return {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()}


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_layers_are_those_that_peft_finds(settings, pipes, name):
    config = settings(*PATTERNS, "lora.alpha=6", family=name).lora
    family = whole(settings(family=name))
    add_lora(family, config, ())
    found = strengths(family.denoiser)
    plain = type(family.denoiser).from_config(family.denoiser.config)
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    plain.add_adapter(PeftConfig(r=2, lora_alpha=6, target_modules=[*found], **patterns))
    assert found == strengths(plain)
    assert {rank for rank, _ in found.values()} >= {2, 3, 4}
    assert {scale for _, scale in found.values()} >= {6 / 2, 6 / 3, 8.5 / 4}


def test_without_an_alpha_each_layer_has_its_own_rank(settings):
    family = whole(settings(family="sd3"))
    add_lora(family, LoraConfig(rank=2, rank_pattern={"to_q": 6}), family.clip_encoders)
    denoiser = strengths(family.denoiser)
    assert {scale for _, scale in denoiser.values()} == {1}
    assert {rank for _, (rank, _) in denoiser.items()} == {2, 6}
    # the patterns are for the denoiser
    assert {rank for rank, _ in strengths(family.pipe.text_encoder).values()} == {2}


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_every_file_has_the_updates_that_are_trained(build, bases, tmp_path, name):
    task = build(name, "lora.alpha=5", "lora.kohya=true", "lora.use_rslora=true")
    task.save(tmp_path)
    files = [tmp_path / WEIGHT_NAME, tmp_path / KOHYA_NAME, tmp_path / "peft"]
    layers = dict(adapted_layers(task.family, ()))
    wanted = {key: layer.get_delta_weight("default") for key, layer in layers.items()}
    peft_format.write(read_lora(files[0], task.family), task.family, files[-1], {})
    for file in files:
        lora = read_lora(file, task.family)
        assert lora.keys() == layers.keys()
        for key, update in lora.items():
            torch.testing.assert_close(update.delta_weight().view_as(wanted[key]), wanted[key])
    pipe = DiffusionPipeline.from_pretrained(bases[name])
    pipe.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    loaded = dict(getattr(pipe, task.family.denoiser_name).named_modules())
    for key, weight in wanted.items():
        layer = loaded[key.partition(".")[2]]
        (adapter,) = layer.lora_A
        torch.testing.assert_close(layer.get_delta_weight(adapter), weight)


UNMET = {
    "no layer": ("{to_qq: 4}", r"lora\.rank_pattern: 'to_qq' names none of the \d+ .*\bto_q \("),
    "an earlier one": (
        "{'to_.': 4, to_q: 8}",
        r"other patterns before 'to_q' decide .* before them",
    ),
}


@pytest.mark.parametrize(("patterns", "message"), UNMET.values(), ids=UNMET)
def test_a_pattern_that_decides_nothing_is_an_error(settings, patterns, message):
    config = settings(f"lora.rank_pattern={patterns}", family="sd15")
    with pytest.raises(UserError, match=message):
        add_lora(whole(config), config.lora, ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank_pattern={'to_(': 4}", r"lora\.rank_pattern: 'to_\(' is not a valid regex"),
        ("rank_pattern={to_q: 0}", r"lora\.rank_pattern"),
        ("rank_pattern={to_q: true}", r"lora\.rank_pattern"),
        ("alpha_pattern={'': 1}", r"lora\.alpha_pattern: a pattern is empty"),
        ("alpha_pattern=[to_q]", r"lora\.alpha_pattern"),
    ],
)
def test_what_is_no_table_of_patterns_is_refused_before_anything_is_loaded(
    tmp_path, override, message
):
    path = tmp_path / "config.yaml"
    path.write_text("kind: dreambooth\ndata: {instance_data_dir: ., instance_prompt: a}")
    with pytest.raises(UserError, match=message):
        loading.load_config(path, [f"lora.{override}"])


def test_their_order_is_a_fact_of_the_run():
    def facts(patterns):
        return config_facts(DreamBoothConfig(lora=LoraConfig(rank_pattern=patterns)))

    assert facts({"to_q": 4, "to_.": 8}) != facts({"to_.": 8, "to_q": 4})
    assert facts({})["lora.rank_pattern"] == []


def test_the_banner_and_the_card_name_their_ranks(build):
    task = build("sd15")
    text = describe_weights(task.config, task)
    number = sum(p.numel() for p in task.module.parameters() if p.requires_grad)
    assert text.startswith("LoRA of rank 1 to 4 in 32 layers")
    assert f"{number:,} parameters" in text
