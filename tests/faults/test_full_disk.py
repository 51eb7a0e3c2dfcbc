"""A disk that is full or cannot be written to costs a message, and no checkpoint."""

import json
import re

import pytest

from tests.shared.disturbed_runs import (
    FINISH,
    PAGE,
    assert_same,
    checkpoint,
    fill,
    metrics,
    names,
    until,
)
from tests.shared.processes import call
from trainers.config import loading
from trainers.dreambooth import DreamBooth
from trainers.run import run
from trainers.training.checkpoint import read_checkpoint


@pytest.mark.parametrize("pages", [0, 3, 12])
def test_a_full_disk_at_a_checkpoint_is_a_warning_and_training_goes_on(
    make, finished, disk, disturb, warning_text, pages
):
    """The pages end before the first file of the checkpoint, within it, and within the next one."""
    settings, left = make(f"output_dir={disk}/run", "tracking.report_to=[tensorboard]"), []

    def look(task):
        left.extend(names(settings))
        assert read_checkpoint(checkpoint(settings, 2))
        (disk / "ballast").unlink()

    disturb({3: lambda task: fill(disk, pages), 4: look})
    run(settings)
    assert re.search(
        r"writing .*/run/checkpoints/step-000004 failed \(.*No space left.*; training goes on",
        warning_text(),
    )
    assert left == ["step-000002"]
    assert metrics(settings) == metrics(finished())
    assert_same(settings, finished())


@pytest.mark.parametrize("first", [3, 2])
def test_a_half_written_line_of_metrics_stops_neither_the_run_nor_the_next(
    make, finished, disk, disturb, warning_text, first
):
    """The file begins with a line that leaves a hundred bytes in its page; `first` is the first
    step after that."""
    settings = make(f"output_dir={disk}/run")
    settings.output_dir.mkdir()
    row = json.dumps({"step": 0, "images_per_second": 1, "peak_memory_gib": 1, "pad": "?"})
    (settings.output_dir / "metrics.jsonl").write_text(
        row.replace("?", "x" * (PAGE - 100 - len(row))) + "\n"
    )
    disturb({0: lambda task: fill(disk), 1: lambda task: (disk / "ballast").unlink()})
    run(until(settings, 4))
    assert re.search(
        r"writing .*/run/metrics.jsonl failed \(.*No space left.*; training goes on", warning_text()
    )
    with open(settings.output_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "denoiser_lo')
    run(settings)
    assert {
        step: loss for step, loss in metrics(finished()).items() if step >= first
    }.items() <= metrics(settings).items()
    assert_same(settings, finished())


@pytest.mark.parametrize("at", ["cache", "export"])
def test_a_disk_that_is_full_for_good_is_one_message(
    make, finished, disk, disturb, capsys, monkeypatch, tmp_path, at
):
    """And once there is room, the same command goes on from the last checkpoint, if any."""
    monkeypatch.setattr(DreamBooth, "finish", FINISH)
    settings = make(f"output_dir={disk}/run", *(["data.cache_dir=null"] if at == "cache" else []))
    (tmp_path / "config.yaml").write_text(loading.dump_config(settings))
    if at == "cache":
        fill(disk, 4)
        remains, left = (
            "There is no checkpoint yet: the same command starts from step 0",
            {".lock", ".owner", "cache"},
        )
    else:
        disturb({3: lambda task: fill(disk)})
        remains = "The checkpoint step-000002 is intact: the same command goes on from it"
        left = {".lock", ".owner", "config.yaml", "metrics.jsonl", "checkpoints"}
        left |= {"report.html", "status.json"}
    assert call("train.py", tmp_path / "config.yaml") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"^the disk is full \(.*No space left.*\)\. Free some space\. " + remains, message
    )
    # what is known about the photos is small, and comes first
    assert {path.name for path in settings.output_dir.iterdir()} - {"intake.json"} == left
    (disk / "ballast").unlink()
    assert call("train.py", tmp_path / "config.yaml") == 0
    assert (settings.output_dir / "pytorch_lora_weights.safetensors").exists()
    assert_same(settings, finished())
