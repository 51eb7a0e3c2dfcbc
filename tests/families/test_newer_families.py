"""Runs of the families that a language model reads prompts for, to their ends: they take long, so
what they must compute stands in the tests that are not slow."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops
from torch import nn

from tests.shared import blocks
from tests.shared.language_models import LENGTH, READ_BY_LANGUAGE_MODELS, velocity
from tests.shared.processes import call
from tests.shared.runs import (
    PRIOR,
    VARIED_CAPTIONS,
    assert_close,
    assert_same,
    first_gradients,
    lora,
    run_steps,
)
from tests.shared.tasks import real_peak
from trainers import memory_plan
from trainers.config.family_facts import family_facts
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.efficiency.apply import open_family
from trainers.run import run

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", READ_BY_LANGUAGE_MODELS)]

SHORT = "train.max_train_steps=2"
SHOWN = "validation.prompts=[a b c]"
CHECKPOINTED = "train.gradient_checkpointing=true"


@pytest.mark.parametrize("overrides", [(), PRIOR], ids=["plain", "prior"])
def test_loss_and_every_gradient_equal_an_independent_step(settings, bases, name, overrides):
    """The reference has the pipeline's own helpers; it shares only the draws."""
    config = settings(LENGTH, *overrides, family=name)
    task, batch, rows, loss, gradients = first_gradients(config)
    pipe = DiffusionPipeline.from_pretrained(bases[name], transformer=task.family.denoiser)
    rng = SampleRng(0, 0, rows, global_batch_size=2)
    x0 = task.family.latents(batch["moments"], rng)
    eps = rng.normal(x0.shape)
    t = torch.sigmoid(torch.special.ndtri(rng.uniform(stratified=True)))
    shift = task.objective(x0.shape[-2:]).shift
    t = shift * t / (1 + (shift - 1) * t)
    level = t.view(-1, 1, 1, 1)
    task.module.zero_grad()
    prompts = ["a b c"] * 2 + ["c"] * (len(rows) - 2)
    v = velocity(pipe, (1 - level) * x0 + level * eps, t, prompts)
    expected = F.mse_loss(v[:2], (eps - x0)[:2])
    if overrides:
        expected = expected + 0.5 * F.mse_loss(v[2:], (eps - x0)[2:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, parameter in trainable_parameters(task.module).items():
        torch.testing.assert_close(gradients[key], parameter.grad, msg=key)


def test_no_cache_gives_identical_gradients(settings, name):
    cached, live = (
        first_gradients(settings(LENGTH, f"data.cache={keep}", family=name))[-1]
        for keep in ("true", "false")
    )
    assert all(torch.equal(cached[key], live[key]) for key in cached)


def test_three_steps_and_three_more_equal_six(settings, tmp_path, captioned_photos, name):
    overrides = (
        f"data.instance_data_dir={captioned_photos}",
        *VARIED_CAPTIONS,
        LENGTH,
        "train.ema_decay=0.9",
        f"data.cache_dir={tmp_path}/cache",
    )
    straight = settings(*overrides, f"output_dir={tmp_path}/straight", family=name)
    parts = settings(*overrides, f"output_dir={tmp_path}/parts", family=name)
    run(straight)
    run_steps(parts, 3)
    run(parts)
    assert_same(straight, parts)


def test_accumulation_equals_one_batch(settings, tmp_path, captioned_photos, name):
    captions = (f"data.instance_data_dir={captioned_photos}", *VARIED_CAPTIONS, LENGTH)
    folders = (f"data.class_data_dir={tmp_path}/class", f"data.cache_dir={tmp_path}/cache")
    shared = (*PRIOR, *captions, *folders)
    one = settings("train.train_batch_size=2", *shared, f"output_dir={tmp_path}/one", family=name)
    parts = ("train.train_batch_size=1", "train.gradient_accumulation_steps=2")
    two = settings(*parts, *shared, f"output_dir={tmp_path}/two", family=name)
    run(one)
    run(two)
    assert_close(one, two)


RUNS = {
    "prior, samples": (*PRIOR, SHOWN),
    "kept outputs": ("data.prior=output_preservation", "data.class_prompt=c"),
    "kohya": ("lora.kohya=true", "lora.alpha=4", "lora.target_modules=all-linear"),
    "DoRA": ("lora.use_dora=true", "lora.target_modules=attention+mlp"),
    "all weights": ("lora=null", SHOWN),
    "nf4": ("model.quantization=nf4",),
    "int8": ("model.quantization=int8",),
    "fp8": ("model.quantization=fp8", CHECKPOINTED),
    "offload": ("model.offload=true", CHECKPOINTED),
    "buckets": ("data.resolution=[16,32]", "data.random_flip=true"),
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_a_run_ends_with_a_file_that_reloads(settings, capsys, name, overrides):
    run(settings(SHORT, *overrides, family=name))
    assert "reload proof: relative difference 0.0e+00" in capsys.readouterr().out


def test_a_bfloat16_run_ends_with_weights_that_reload(settings, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    final = settings(*PRIOR, SHOWN, SHORT, family=name)
    run(final)
    assert all(tensor.dtype == torch.float32 for tensor in lora(final).values())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_every_linear_layer_of_the_blocks_is_quantized(settings, name, method):
    config = settings(f"model.quantization={method}", family=name)
    family = open_family(config.model)
    family.load("transformer")
    linear = [n for n, layer in family.denoiser.named_modules() if isinstance(layer, nn.Linear)]
    changed = [n for n in linear if type(family.denoiser.get_submodule(n)) is not nn.Linear]
    assert changed == [n for n in linear if family.facts.is_in_block(n)] != []


@pytest.mark.parametrize("kind", ["true", "selective"])
def test_checkpointed_blocks_give_the_same_gradients(settings, name, kind):
    plain, checkpointed = (
        blocks.gradients(*blocks.build(settings(*more, family=name)))
        for more in ((), (f"train.gradient_checkpointing={kind}",))
    )
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


def test_compiled_blocks_give_the_same_gradients(settings, name):
    if "train.compile=True" in family_facts(name).refused:
        pytest.skip("it is refused")
    plain, fast = (
        blocks.gradients(*blocks.build(settings(LENGTH, *more, family=name)))
        for more in ((), (blocks.COMPILED,))
    )
    blocks.assert_close(plain, fast)


@pytest.mark.parametrize("overrides", [(), (CHECKPOINTED,), ("lora=null",)], ids=str)
def test_the_planned_step_is_the_real_one(settings, name, overrides):
    sizes = ("data.resolution=32", "train.train_batch_size=4")
    config = settings(LENGTH, SHORT, *sizes, *overrides, family=name)
    planned = memory_plan.plan_memory(config, torch.float32, has_cpu_memory=True)
    assert planned.phases["train"] == pytest.approx(real_peak(config), rel=0.05)


def test_the_cards_own_code_makes_the_final_samples(settings, name):
    """By plain diffusers; and they are not what the base draws."""
    config = settings(*PRIOR, LENGTH, "lora.alpha=5", SHOWN, family=name)
    run(config)
    card = (config.output_dir / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    base = config.model.pretrained_model_name_or_path
    code = code.replace("PRETRAINED_MODEL_NAME_OR_PATH", base)
    ours = Image.open(config.output_dir / "samples/final/00-0.png")
    for is_trained in (True, False):
        if not is_trained:
            code = code.replace("pipe.load_lora_weights", "str")
        scope = {}
        exec(code.replace("PATH_OR_REPO", str(config.output_dir)), scope)
        difference = ImageChops.difference(ours, scope["image"]).getbbox()
        assert (difference is None) == is_trained


def test_the_scripts_take_its_runs(settings, tmp_path, name):
    config = settings(SHORT, SHOWN, family=name)
    run(config)
    drawn = ("--prompt", "a b", "--out", tmp_path / "drawn")
    assert call("generate.py", config.output_dir, *drawn) == 0
    for form in ("kohya", "peft", "merged"):
        assert call("export.py", config.output_dir, "--format", form, "--out", tmp_path / form) == 0
