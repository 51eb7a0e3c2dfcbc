"""scripts/export.py: merged weights, other formats, lower ranks, the difference of two models."""

import sys

import export as script
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.saved_loras import ALL, check, family_of, products
from trainers.families import FAMILIES
from trainers.lora.files import read_lora
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("name", by_hand_but(EACH_TIME, ALL))
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
