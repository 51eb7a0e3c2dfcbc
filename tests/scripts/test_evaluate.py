"""scripts/evaluate.py measures the weights that it names, on the run's own pictures."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from small_world.judge import load_judge
from small_world.world import HELD_OUT_SEED, subject_images
from tests.shared.by_hand import by_hand_but
from tests.shared.feature_networks import MEAN_COLOUR
from tests.shared.processes import call
from trainers import evaluate
from trainers.config.loading import load_config
from trainers.evaluate import EvaluationOptions, plan_samples
from trainers.families import FAMILIES
from trainers.families.sampling import sample_picture
from trainers.lora.low_rank import energy_by_rank
from trainers.lora.peft_format import from_peft
from trainers.metrics import feature_networks
from trainers.metrics.feature_networks import FeatureNetwork
from trainers.run import run

WEIGHTS = "pytorch_lora_weights.safetensors"
CLASS = ["data.class_prompt=[g h, i j]", "data.num_class_images=2"]


def png(path):
    return Image.open(path).convert("RGB").tobytes()


KINDS = {
    "sd15": ("sd15", ["lora.alpha=5", "train.ema_decay=0.5"]),
    "text": ("sd15", ["lora.use_rslora=true", "train.train_text_encoder=true"]),
    "flux": ("flux", ["data.cache=false"]),
}


def check_strengths(result):
    """At strength 0 the figures of the base, at 1 those of the LoRA, and others between them."""
    base, final = result["rows"][0], result["rows"][-1]
    zero, half, one = result["strength"]
    assert zero == {"scale": 0, "subject": base["subject"], "prior_drift": 0}
    assert one == {"scale": 1, "subject": final["subject"], "prior_drift": final["prior_drift"]}
    assert half["subject"] not in (zero["subject"], one["subject"])


def check_best(folder, short):
    """best/ has the weights of a run that ended there."""
    found, expected = load_file(folder / "best" / WEIGHTS), load_file(short.output_dir / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def check_memorisation(folder, rows):
    assert [row["sample"] for row in rows] == [
        f"evaluation/final/{row}-00.png" for row in ("subject", "class", "prompt-0")
    ]
    assert all((folder / row[name]).is_file() for row in rows for name in ("sample", "photo"))


@pytest.mark.parametrize("kind", by_hand_but(["sd15"], KINDS))
def test_every_row_is_of_the_weights_that_it_names(settings, tmp_path, monkeypatch, kind):
    family, overrides = KINDS[kind]
    wanted = ["validation.prompts=[a b c, d]", "checkpoint.checkpointing_steps=3"]
    config = settings(*wanted, *CLASS, *overrides, family=family)
    run(config)
    folder, generated = config.output_dir, config.output_dir / "evaluation"
    monkeypatch.setattr(evaluate, "best_row", lambda rows: rows[0])
    options = EvaluationOptions(checkpoints=True, strengths=(0, 0.5, 1), num_images=1)
    result = evaluate.evaluate(config, folder, [MEAN_COLOUR], options)
    assert json.loads((folder / "evaluation.json").read_text()) == result
    base, _, six, final = result["rows"]
    names = [row["checkpoint"] for row in result["rows"]]
    assert names == ["base", "step-000003", "step-000006", "final"]
    assert [row["step"] for row in result["rows"]] == [0, 3, 6, 6]

    fresh = FAMILIES[family](config.model)
    fresh.load("vae", fresh.denoiser_name, *fresh.text_encoder_names)
    plain = sample_picture(fresh, "a b c", config.validation, 0, (16, 16)).tobytes()
    assert (
        png(generated / "base/subject-00.png")
        == png(generated / "strength-0.00/subject-00.png")
        == plain
    )
    assert base["prior_drift"] == base["pixel_drift"] == 0 < final["pixel_drift"]
    check_strengths(result)

    for row, number in (("subject", "00"), ("prompt-0", "01")):
        own = png(folder / f"samples/final/{number}-0.png")
        assert (
            own
            == png(generated / f"final/{row}-00.png")
            == png(generated / f"step-000006/{row}-00.png")
            != plain
        )
    assert six | {"checkpoint": "final"} == final

    train = config.train.model_copy(update={"max_train_steps": 3})
    short = config.model_copy(update={"output_dir": tmp_path / "short", "train": train})
    shutil.copytree(folder / "class_images", short.output_dir / "class_images")
    run(short)
    third = png(generated / "step-000003/subject-00.png")
    samples = short.output_dir / "samples/final"
    assert png(samples / "00-0.png") == third != png(generated / "final/subject-00.png")

    assert result["best"] == "step-000003"
    check_best(folder, short)
    fresh.pipe.load_lora_weights(folder / "best")
    assert sample_picture(fresh, "a b c", config.validation, 0, (16, 16)).tobytes() == third
    check_memorisation(folder, result["memorisation"])


def test_a_base_under_dora_is_the_base(settings):
    """Its magnitudes are no part of the scale."""
    config = settings("lora.use_dora=true")
    run(config)
    evaluate.evaluate(
        config, config.output_dir, [MEAN_COLOUR], EvaluationOptions(strengths=(), num_images=1)
    )
    fresh = FAMILIES["sd15"](config.model)
    fresh.load("vae", "unet", "text_encoder")
    plain = sample_picture(fresh, "a b c", config.validation, 0, (16, 16)).tobytes()
    assert png(config.output_dir / "evaluation/base/subject-00.png") == plain
    assert png(config.output_dir / "evaluation/final/subject-00.png") != plain


def test_prompts_take_turns_and_the_wished_ones_win(settings):
    config = settings(
        *CLASS,
        "validation.prompts=[a b c, d, d]",
        "validation.seed=5",
        "data.instance_prompt=a b c",
    )
    assert plan_samples(config, [], EvaluationOptions(num_images=3)) == {
        "subject": [("a b c", 5), ("a b c", 6), ("a b c", 7)],
        "class": [("g h", 5), ("i j", 6), ("g h", 7)],
        "prompt-0": [("d", 5), ("d", 6), ("d", 7)],
    }


def test_prompts_have_the_trigger_and_the_subjects_what_its_captions_have(settings):
    around = ("data.caption_prefix=a photo of", "data.caption_suffix=', day'")
    config = settings("data.trigger=sks", "data.instance_prompt='[trigger] dog'", *around)
    options = EvaluationOptions(num_images=1, prompts=["{trigger} at night"], class_prompts=["c"])
    assert plan_samples(config, [], options) == {
        "subject": [("a photo of sks dog, day", 0)],
        "class": [("c", 0)],
        "prompt-0": [("sks at night", 0)],
    }


def test_without_an_instance_prompt_the_captions_take_turns(settings, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "captioned")
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"caption {i % 2}")
    config = settings(f"data.instance_data_dir={folder}", "data.instance_prompt=null")
    prompt_seeds = plan_samples(
        config, evaluate.load_instance_pictures(config.data), EvaluationOptions(num_images=6)
    )
    assert [prompt for prompt, _ in prompt_seeds["subject"]] == [
        f"caption {i}" for i in (0, 1, 0, 1, 0, 0)
    ]


@pytest.fixture
def bare(monkeypatch):
    """A machine without networks."""
    monkeypatch.setattr(feature_networks, "DINO_NAMES", ())
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())


def test_the_script_prints_what_it_measured_and_with_what(settings, nets, bare, tmp_path, capsys):
    config = settings(*CLASS)
    run(config)
    photos = tmp_path / "held_out"
    photos.mkdir()
    Image.new("RGB", (30, 20), "red").save(photos / "a.png")
    options = ["--dino", nets[0], "--clip", nets[1]]
    options += ["--num-images", 2, "--strengths", 0.5, "--prompts", "b"]
    assert (
        call("evaluate.py", config.output_dir, "--photos", photos, "--class-prompt", "k", *options)
        == 0
    )
    printed = capsys.readouterr().out
    result = json.loads((config.output_dir / "evaluation.json").read_text())
    assert result["columns"] == [
        "subject",
        "prior_drift",
        "pixel_drift",
        "diversity",
        "clip_i",
        "clip_t",
    ]
    assert all(math.isfinite(row[name]) for row in result["rows"] for name in result["columns"])
    assert all(f"{row['subject']:.3f}" in printed for row in result["rows"] + result["strength"])
    assert result["photos"] == "held out"
    assert str(nets[0]) in result["net"] in printed
    assert str(nets[1]) in result["prompt_net"] in printed
    assert result["best"] is None
    kept = energy_by_rank(from_peft(load_file(config.output_dir / WEIGHTS)))
    assert result["spectrum"] == {"1": kept[0], "2": kept[1]}
    before, kept = (
        result["rows"][-1]["clip_t"],
        png(config.output_dir / "evaluation/final/subject-01.png"),
    )
    assert call("evaluate.py", config.output_dir, *options[2:], "--checkpoints") == 0
    assert "by nothing" not in capsys.readouterr().out
    result = json.loads((config.output_dir / "evaluation.json").read_text())
    assert result["rows"][-1]["clip_t"] == before
    assert png(config.output_dir / "evaluation/final/subject-01.png") == kept
    assert result["net"] == result["prompt_net"]  # CLIP alone
    assert result["columns"] == ["subject", "prior_drift", "pixel_drift", "diversity", "clip_t"]
    assert (config.output_dir / "best" / WEIGHTS).is_file()


@pytest.mark.usefixtures("bare")
def test_what_is_missing_is_reported_before_a_picture_is_generated(settings, photos, nets, capsys):
    config = settings()
    folder = config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text((folder.parent / "config.yaml").read_text())
    dino = ["--dino", nets[0]]
    assert call("evaluate.py", folder, *dino) == 2
    assert "is not finished" in capsys.readouterr().err
    (folder / WEIGHTS).touch()
    for options, message in {
        (): "hf download facebook/dinov2-small",
        ("--clip", "no/such-clip"): "hf download no/such-clip",
    }.items():
        assert call("evaluate.py", folder, *options) == 2
        assert message in capsys.readouterr().err
    assert call("evaluate.py", folder, *dino, "--photos", photos) == 2
    assert "is not held out" in capsys.readouterr().err
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("lora: {rank: 2}", "lora: null"))
    (folder / "pipeline").mkdir()
    assert call("evaluate.py", folder, *dino) == 2
    assert "trained all weights" in capsys.readouterr().err
    assert not (folder / "evaluation").exists()


# Trainings of minutes, by hand: pytest -m slow -s


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_on_the_small_world_trained_is_above_half_trained_is_above_the_base(tmp_path, seed):
    run_folder, photos = tmp_path / "run", tmp_path / "held_out"
    options = [
        "train.max_train_steps=400",
        "checkpoint.checkpointing_steps=200",
        "tracking.report_to=[]",
    ]
    config = load_config(
        "configs/quickstart.yaml", [f"seed={seed}", f"output_dir={run_folder}", *options]
    )
    run(config)
    photos.mkdir()
    for i, picture in enumerate(subject_images(20, HELD_OUT_SEED)):
        picture.save(photos / f"{i:02d}.png")
    judge = load_judge()
    nets = [FeatureNetwork("the small world's judge", lambda x: judge(x)[1] - judge.centre)]
    for net in nets:
        evaluation_options = EvaluationOptions(
            photos=photos, prompts=[], checkpoints=True, strengths=(), num_images=16
        )
        result = evaluate.evaluate(config, run_folder, [net], evaluation_options)
        print(f"\nseed {seed}\n{evaluate.format_evaluation(result)}", flush=True)
        subject = {row["step"]: row["subject"] for row in result["rows"]}
        assert subject[400] > subject[200] > subject[0]
