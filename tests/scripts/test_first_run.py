"""What a person reads of a run: before its first step, after its last, and when it is stopped."""

import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.shared.processes import launch
from trainers.banners import end_banner
from trainers.config import Config, DreamBoothConfig
from trainers.run import run
from trainers.training.failures import resume_command, resume_hint, stop_advice


def banner(text):
    """The rows of the first block of indented lines, by their names."""
    block = re.search(r"^\w+, seed \d+\n((?:  .*\n)+)", text, re.MULTILINE)[1]
    return dict(re.findall(r"^  (\w[\w ]*?)  +(.*)$", block, re.MULTILINE))


def test_a_run_that_has_no_prompt_suggests_none_that_is_empty(tmp_path):
    def suggested(**data):
        config = DreamBoothConfig(output_dir=tmp_path, data=data)
        return re.search(r"--prompt (.*)", end_banner(config, 4))[1]

    assert suggested() == "'as in your captions'"
    assert suggested(trigger="sks") == "sks"


def test_a_run_says_what_it_will_do_and_how_its_result_is_used(settings, capsys):
    config = settings(
        "train.max_train_steps=4",
        "train.gradient_accumulation_steps=3",
        "data.center_crop=false",
        "data.class_prompt=c",
        "data.num_class_images=3",
    )
    (Path(config.data.instance_data_dir) / "film.mp4").write_bytes(b"no picture")
    run(config)
    told = capsys.readouterr().out
    rows = banner(told)
    assert told.index("seed 0") < told.index("reload proof") < told.index("done: ")
    photos = len(list(Path(config.data.instance_data_dir).glob("*.png")))
    assert rows["photos"].startswith(f"{photos} of ")
    assert "film.mp4" in rows["not used"]
    assert rows["class"] == "3 pictures of 1 prompt, weight 1"
    assert rows["resolution"] == "16 x 16, random crops"
    match = re.fullmatch(r"LoRA of rank 2 in (\d+) layers: ([\d,]+) parameters", rows["trained"])
    weights = load_file(config.output_dir / "pytorch_lora_weights.safetensors")
    assert int(match[1]) == len(weights) / 2
    assert int(match[2].replace(",", "")) == sum(w.numel() for w in weights.values())
    assert rows["steps"] == f"4 = {24 / photos:.3g} epochs of {photos} pictures"
    assert rows["batch"] == "6 pictures = 2 x 3 accumulated x 1 process"
    assert rows["device"].endswith("float32")
    assert f'pipe.load_lora_weights("{config.output_dir}")' in told
    assert "scripts/generate.py" in told
    assert "ComfyUI: put " in told


def test_commands_of_the_end_survive_a_shell(tmp_path):
    text = end_banner(Config(kind="unet", output_dir=tmp_path / "my $HOME"), 4)
    assert f"python scripts/translate.py '{tmp_path}/my $HOME' PICTURES" in text
    assert f"python scripts/push.py '{tmp_path}/my $HOME'" in text


@pytest.mark.parametrize(
    ("argv", "environment", "command"),
    [
        (["scripts/train.py", "a b.yaml"], {}, " (python scripts/train.py 'a b.yaml')"),
        (["scripts/train.py", "a.yaml"], {"ACCELERATE_DYNAMO_BACKEND": "no"}, ""),
        (["pytest"], {}, ""),
    ],
)
def test_the_command_to_go_on_with_is_told_where_it_is_known(
    argv, environment, command, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "argv", argv)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resume_command() == command
    config = Config(output_dir=tmp_path)
    assert resume_hint(config).endswith(f"starts from step 0{command}")
    assert stop_advice(config).endswith(f"from the checkpoint{command}")


def test_what_is_told_comes_before_the_progress_in_a_log_of_both(settings, tmp_path):
    """stdout is a file here, and would be written at the end."""
    path, log = settings().output_dir.parent / "config.yaml", tmp_path / "log"
    assert launch("train.py", path, "train.max_train_steps=1", log=log, processes=1) == [0]
    told = Path(f"{log}.0").read_text()
    lines = told.splitlines()
    assert "\r" not in told
    places = [
        next(i for i, line in enumerate(lines) if part in line)
        for part in ("seed 0", "step 1/1  loss", "done: ")
    ]
    assert places == sorted(places)
    known = ("data: ", "dreambooth, seed", "  ", "reload proof", "done: ")
    others = [line for line in lines if not line.startswith(known)]
    # the libraries say nothing
    assert [line for line in others if "step 1/1" not in line] == []
