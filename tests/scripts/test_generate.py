"""scripts/generate.py makes the run's own final samples again, from the run folder and from the
bare LoRA file."""

import subprocess
import sys

import pytest
from PIL import Image

from tests.shared.processes import ROOT
from trainers.run import run


def generate(*arguments):
    command = [sys.executable, "scripts/generate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# longer than the tiny CLIP reads at a time, with a place for the trigger
PROMPT = "{trigger} b c d e f g h i j k l m"


@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("sd15", ["model.clip_chunks=2"], id="sd15"),
        pytest.param("flux", [], id="flux", marks=pytest.mark.slow),
    ],
)
def test_a_run_and_its_file_give_the_final_samples_again(settings, bases, tmp_path, family, more):
    options = [f"validation.prompts=['{PROMPT}']", "validation.num_images=2", "lora.alpha=5"]
    config = settings(*options, *more, "data.trigger=z", family=family)
    run(config)
    final = Image.open(config.output_dir / "samples/final/00-1.png").tobytes()
    done = generate(config.output_dir, "--prompt", PROMPT, "--out", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "folder/00-1.png").tobytes() == final


@pytest.mark.slow
def test_a_bare_file_takes_its_base(settings, bases, tmp_path):
    config = settings()
    run(config)
    file = config.output_dir / "pytorch_lora_weights.safetensors"
    options = [
        "--prompt",
        "a b c",
        "--steps",
        2,
        "--guidance",
        2,
        "--resolution",
        16,
        "--out",
        tmp_path / "out",
    ]
    done = generate(file, "--base", bases["sd15"], *options)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out/00-0.png").size == (16, 16)
    assert "there is no diffusers pipeline" in generate(file, "--base", tmp_path, *options).stderr
