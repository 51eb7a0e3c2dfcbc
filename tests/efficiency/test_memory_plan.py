"""The plan counts what a step really holds; presets are written out, and what a config says itself
stays."""

import pytest
import torch

from tests.shared.by_hand import by_hand_but
from tests.shared.processes import call
from tests.shared.tasks import real_peak
from trainers import cpu_memory, memory_plan
from trainers.config import loading
from trainers.efficiency.apply import open_family

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
CHECKPOINTED = "train.gradient_checkpointing=true"
LESS_TO_REMEMBER = ("adamw_8bit", "paged_adamw_8bit", "adafactor")


@pytest.mark.parametrize("family", by_hand_but(["sd15", "flux"], FAMILIES))
@pytest.mark.parametrize(
    "overrides", [(), (CHECKPOINTED, "lora.rank=8"), ("lora=null", "data.resolution=32")]
)
def test_the_planned_step_is_the_real_one(settings, family, overrides):
    chosen = settings(
        "train.max_train_steps=2",
        "train.train_batch_size=4",
        "data.resolution=32",
        *overrides,
        family=family,
    )
    planned, real = (
        memory_plan.plan_memory(chosen, torch.float32, has_cpu_memory=True).phases["train"],
        real_peak(chosen),
    )
    assert planned == pytest.approx(real, rel=0.05)


def test_on_a_cpu_the_libraries_count_and_what_is_kept_of_a_step(settings):
    """Weights lie where they are: the share is of the rest, and in no other phase."""
    chosen = settings("data.resolution=32", "validation.prompts=[a b c]")
    beside, alone = (
        memory_plan.plan_memory(chosen, torch.float32, has_cpu_memory=has).phases
        for has in (True, False)
    )
    family = open_family(chosen.model)
    weights = sum(p.numel() * 4 for p in family.meta_model("unet").parameters())
    kept = cpu_memory.KEPT_SHARE * (beside["train"] - weights)
    for phase, size in beside.items():
        expected = size + cpu_memory.LIBRARY_BYTES + kept * (phase == "train")
        assert alone[phase] == pytest.approx(expected, abs=1)


@pytest.mark.slow
def test_checkpointing_fewer_bits_and_the_cache_need_less_and_larger_batches_more(settings):
    def peak(*overrides):
        return memory_plan.plan_memory(
            settings(*overrides, family="flux"), torch.float32, has_cpu_memory=True
        ).phases["train"]

    plain, away = peak(), peak(CHECKPOINTED, "model.offload=true")
    assert away < peak(CHECKPOINTED) < peak("train.gradient_checkpointing=selective") < plain
    assert plain < peak("train.train_batch_size=8")
    assert peak(CHECKPOINTED, "model.offload=true", "model.modulation_cache=true") < away
    assert peak("model.quantization=nf4") < peak("model.quantization=int8") < plain
    assert peak("model.modulation_cache=true") < plain


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS_TO_REMEMBER)
def test_an_optimiser_with_less_to_remember_is_planned_like_adamw(settings, name):
    planned, usual = (
        memory_plan.plan_memory(settings(*more), torch.float32, has_cpu_memory=False)
        for more in ([f"optimizer.name={name}"], [])
    )
    assert planned == usual


@pytest.mark.slow
def test_fp8_leaves_adaptive_norms_as_they_are(settings):
    """As diffusers' layerwise casting; int8 has as many bits, and has them too."""

    def peak(how):
        chosen = settings(f"model.quantization={how}", CHECKPOINTED, family="flux")
        return memory_plan.plan_memory(chosen, torch.bfloat16, has_cpu_memory=True).phases["train"]

    assert peak("int8") < peak("fp8") < peak("none")


@pytest.mark.slow
def test_a_multiplication_costs_what_flops_say(settings):
    one, two = (
        memory_plan.plan_memory(
            settings(f"train.train_batch_size={n}"), torch.float32, has_cpu_memory=False
        ).flops
        for n in (1, 2)
    )
    assert two == pytest.approx(2 * one, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.memory=fast",), (False, False, "none")),
        (("train.memory=balanced",), (True, "selective", "none")),
        (("train.memory=low",), (True, True, "none")),
        (("train.memory=lowest",), (False, True, "nf4")),
        (("train.memory=low", "train.gradient_checkpointing=false"), (True, False, "none")),
        (("train.memory=low", "train.train_text_encoder=true"), (False, True, "none")),
        (("train.memory=lowest", "lora=null"), (False, True, "none")),
    ],
)
def test_presets_set_what_the_config_leaves_open(settings, overrides, expected):
    chosen = settings(*overrides, family="flux")
    assert (
        chosen.model.modulation_cache,
        chosen.train.gradient_checkpointing,
        chosen.model.quantization,
    ) == expected


def test_a_preset_survives_being_written_down(settings, tmp_path):
    chosen = settings("train.memory=low", family="flux")
    (tmp_path / "written.yaml").write_text(loading.dump_config(chosen))
    assert loading.load_config(tmp_path / "written.yaml") == chosen


def test_the_script_names_the_first_preset_that_fits(settings, tmp_path, capsys):
    (tmp_path / "flux.yaml").write_text(
        loading.dump_config(settings(family="flux")).replace("modulation_cache: false", "")
    )
    assert call("plan.py", tmp_path / "flux.yaml", "--memory", "100", "--tflops", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "train.memory=fast"
    assert call("plan.py", tmp_path / "flux.yaml", "--memory", "1e-6", "--tflops", "1") == 0
    assert "none of them fits" in capsys.readouterr().out
