"""RUN@best names the weights of the best validation, and every script takes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file

from tests.shared.local_hub import serving
from tests.shared.processes import call
from tests.shared.runs import config_maker
from tests.shared.scripted_validations import script_validations
from trainers.config.loading import dump_config
from trainers.metrics import feature_networks
from trainers.publishing.report import write_report
from trainers.run import run
from trainers.run_folder import BEST, WEIGHT_NAME, read_best


@pytest.fixture(scope="module")
def finished(bases, photos, other_photos, tmp_path_factory):
    """Config of a run of eight steps whose best was the second."""
    make = config_maker(bases, photos, tmp_path_factory.mktemp("finished"))
    config = make(
        f"data.held_out_dir={other_photos}",
        "validation.prompts=[a b c]",
        "validation.validation_steps=1",
        "train.max_train_steps=4",
        "train.ema_decay=0.5",
    )
    with pytest.MonkeyPatch.context() as patch:
        script_validations(patch.setattr)([5, 1, 4, 3])
        run(config)
    return config


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_it_gives_the_pictures_of_its_step(finished, tmp_path, capsys):
    folder = finished.output_dir
    arguments = ["--prompt", "a b c", "--out", tmp_path]
    assert call("generate.py", f"{folder}@best", *arguments) == 0
    assert "held_out_loss 1 at step 2" in capsys.readouterr().out
    own = picture(tmp_path / "00-0.png")
    # the layers of the training round otherwise than those of diffusers
    assert abs(own - picture(folder / "samples/step-000002/00-0.png")).max() <= 1
    assert abs(own - picture(folder / "samples/step-000004/00-0.png")).max() > 3


def test_it_is_exported_and_pushed_with_a_card_of_its_own(finished, tmp_path, monkeypatch):
    folder = finished.output_dir
    assert call("export.py", f"{folder}@best", "--format", "diffusers") == 0
    kept = load_file(folder / BEST / WEIGHT_NAME)
    exported = load_file(folder / f"{folder.name}@best_diffusers.safetensors")
    assert all(tensor.equal(exported[name]) for name, tensor in kept.items())
    # a run whose config says so is pushed with them, without being asked
    text = dump_config(finished).replace("weights: last", "weights: best")
    (folder / "config.yaml").write_text(text)
    with serving(tmp_path, monkeypatch):
        assert call("push.py", folder, "--repo", "me/mine") == 0
        there = Path(snapshot_download("me/mine"))
    assert (there / WEIGHT_NAME).read_bytes() == (folder / BEST / WEIGHT_NAME).read_bytes()
    card = (there / "README.md").read_text()
    assert "held out loss 1, the best of the validations" in card
    assert "2 of 2 x 1 pictures" in card
    assert not (there / "best.json").exists()


def test_the_end_was_told_and_the_report_tells_it(finished):
    page = write_report(finished.output_dir).read_text()
    assert "that was 2 steps before the end, and none was better since" in page
    assert "s each, " in page
    card = (finished.output_dir / "README.md").read_text()
    assert "| Best | held out loss 1 at step 2, kept in best/ |" in card


def test_an_evaluation_of_it_lies_beside_that_of_the_run(finished, monkeypatch, nets):
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())
    folder = finished.output_dir
    options = ["--dino", nets[0], "--num-images", "1", "--strengths", "1"]
    assert call("evaluate.py", f"{folder}@best", *options) == 0
    result = json.loads((folder / "evaluation-step-000002/evaluation.json").read_text())
    assert result["rows"][-1]["step"] == 2
    assert read_best(folder / BEST)["metric"] == "held_out_loss"


def test_a_run_without_one_says_what_keeps_it(settings, capsys):
    config = settings()
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    assert call("export.py", f"{config.output_dir}@best") == 2
    assert "has no best/best.json: a run keeps its best weights where" in capsys.readouterr().err
