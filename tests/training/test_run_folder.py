"""A run folder: its names are its own, what else lies there is let be, nothing is half there."""

import ast
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.shared.processes import ROOT
from trainers import atomic, run_folder
from trainers.config import AutoencoderConfig
from trainers.config.base_sections import CheckpointConfig, TrackingConfig
from trainers.config.loading import dump_config
from trainers.errors import UserError
from trainers.publishing.hub import files_to_upload
from trainers.publishing.report import write_report
from trainers.training.callbacks import LogMetrics
from trainers.training.checkpoint import resume, save_checkpoint
from trainers.training.facts import resume_facts
from trainers.training.loop import Player
from trainers.training.manifest import read_checkpoint
from trainers.training.run_state import RunState


@pytest.fixture
def run(tmp_path):
    """A run without a trainer: its `save(step)` writes a checkpoint, its `resume()` reads one."""
    config = AutoencoderConfig(
        output_dir=tmp_path / "run",
        checkpoint=CheckpointConfig(checkpoints_total_limit=2),
        tracking=TrackingConfig(report_to=[]),
        train={"max_train_steps": 10**7},
    )
    accelerator, net = Accelerator(cpu=True), nn.Linear(2, 2)
    player = Player(net, torch.optim.AdamW(net.parameters()))
    task = SimpleNamespace(players={"net": player})
    facts = resume_facts(config, accelerator, {"pictures": {}})

    def save(*steps):
        for step in steps:
            save_checkpoint(config, task, accelerator, RunState(facts, step))

    return SimpleNamespace(
        config=config,
        accelerator=accelerator,
        root=config.output_dir / "checkpoints",
        save=save,
        resume=lambda: resume(config, task, accelerator, facts).step,
        names=lambda: sorted(path.name for path in (config.output_dir / "checkpoints").iterdir()),
    )


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-000004", 4),
        ("step-1000000", 1_000_000),
        *((f"step-{digits}", None) for digits in ("4", "0000004", "00000٤", "-00004", "abc", "")),
        *((f"step-000004{end}", None) for end in (".zip", " (copy)", "\n", "~")),
        (".step-000004", None),
        ("left-000004", None),
    ],
)
def test_only_the_names_that_we_write_are_read_as_steps(name, step):
    assert run_folder.parse_step(name) == step
    assert step is None or run_folder.step_name(step) == name


def test_what_lies_beside_the_checkpoints_is_neither_a_hindrance_nor_touched(run):
    run.save(2)
    foreign = {}
    for name in (".DS_Store", "step-000004.zip", "step-abc", "step-000006", "._step-000002"):
        (run.root / name).write_bytes(name.encode())
        foreign[name] = name.encode()
    copy = shutil.copytree(run.root / "step-000002", run.root / "step-000002 (copy)")
    (run.root / ".git").mkdir()
    (run.root / ".git" / "HEAD").write_text("ref")
    run.save(4, 8, 10)
    assert run.resume() == 10
    assert {name: (run.root / name).read_bytes() for name in foreign} == foreign
    assert read_checkpoint(copy)
    assert (run.root / ".git" / "HEAD").read_text() == "ref"
    ours = {"step-000008", "step-000010"}
    assert set(run.names()) == {*foreign, ".git", "step-000002 (copy)", *ours}


def test_a_file_with_the_name_of_a_checkpoint_costs_that_checkpoint_and_a_warning(run):
    run.save(2)
    (run.root / "step-000004").write_text("mine")
    (run.root / "step-000006").mkdir()
    (run.root / "step-000006" / "notes.txt").write_text("mine")
    for step in (4, 6):
        with pytest.warns(UserWarning, match=f"step-00000{step} is no checkpoint of this run"):
            run.save(step)
    run.save(8)
    assert (run.root / "step-000004").read_text() == "mine"
    assert (run.root / "step-000006" / "notes.txt").read_text() == "mine"
    assert run.resume() == 8
    assert run.names() == ["step-000002", "step-000004", "step-000006", "step-000008"]


def test_steps_from_a_million_on_are_numbers(run):
    run.save(999_998, 999_999, 1_000_000, 1_000_001)
    assert run.names() == ["step-1000000", "step-1000001"]
    assert run.resume() == 1_000_001
    for step in (999_999, 1_000_000):
        folder = run.config.output_dir / "samples" / run_folder.step_name(step)
        folder.mkdir(parents=True)
        (folder / "grid.png").touch()
    grids = run_folder.sample_grids(run.config.output_dir)
    assert [grid.parent.name for grid in grids] == ["step-999999", "step-1000000"]


@pytest.mark.parametrize(
    "content",
    [b"null", b"[]", b"3", b'"x"', b"{}", b"", b"\xff\xfe\x00", b"[" * 10**5, b'{"step": "6"}'],
)
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(run, content):
    run.save(4, 6)
    (run.root / "step-000006" / "manifest.json").write_bytes(content)
    with pytest.warns(UserWarning, match="step-000006 is damaged and is passed over"):
        assert run.resume() == 4
    assert run.names() == ["left-000006", "step-000004"]


def test_a_copy_under_the_name_of_a_later_step_is_not_that_step(run):
    run.save(2)
    shutil.copytree(run.root / "step-000002", run.root / "step-000008")
    with pytest.warns(UserWarning, match="step-000008 is damaged"):
        assert run.resume() == 2
    assert run.names() == ["left-000008", "step-000002"]


def test_pruning_counts_and_removes_complete_checkpoints_alone(run):
    run.save(2, 4)
    (run.root / "step-000004" / "net.safetensors").unlink()
    run.save(6, 8)
    assert run.names() == ["step-000004", "step-000006", "step-000008"]


def test_what_is_set_aside_takes_no_name_of_the_users(run):
    (run.root / "left-000006").mkdir(parents=True)
    (run.root / "left-000006" / "notes.txt").write_text("mine")
    run.save(4, 6)
    (run.root / "step-000006" / "manifest.json").write_text("null")
    with pytest.warns(UserWarning, match="damaged"):
        run.resume()
    assert (run.root / "left-000006" / "notes.txt").read_text() == "mine"
    assert run.names() == ["left-000006", "left-000006-2", "step-000004"]


def line(step, **values):
    return json.dumps({"step": step, "denoiser_loss": 1 / 3, **values}).encode()


BAD_LINES = [
    line(2).replace(b"loss", b"l\xffss"),
    b"\x00" * 40,
    line(2)[:-9],
    b"null",
    b"[1]",
    b'{"step": null}',
    b'{"step": "2"}',
    b'{"step": true}',
    b"[" * 10**5,
    line(2).replace(b"2", b"9" * 5000, 1),
    "\u2028".encode(),
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_of_metrics_is_left_out_with_a_warning(run, bad):
    folder = run.config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(run.config))
    (folder / "metrics.jsonl").write_bytes(b"\n".join([line(1), bad, line(3), line(9)]) + b"\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl: 1 damaged lines are left out \(line 2\)"):
        write_report(folder)
    with pytest.warns(UserWarning, match="1 damaged lines"):
        log = LogMetrics(run.config, run.accelerator, lambda step: 1.0, start=3)
    log.progress.close()
    assert (folder / "metrics.jsonl").read_bytes() == line(1) + b"\n" + line(3) + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_train_steps: 10000000", "max_train_steps: 1l6"), "train.max_train_steps: .*'1l6'"),
        (("max_train_steps", "max_trian_steps"), "did you mean train.max_train_steps"),
        (("kind: autoencoder", "kind: autoencodr"), "did you mean autoencoder"),
        (("train:", "train: ["), "not valid YAML"),
        ((None, "- a list\n"), "must contain sections"),
        ((None, b"\xff\xff"), "not valid YAML"),
    ],
)
def test_a_mistake_in_the_config_of_a_run_is_told_and_no_default_taken(run, change, message):
    folder, (old, new) = run.config.output_dir, change
    (folder / "model").mkdir(parents=True)
    text = dump_config(run.config)
    if old:
        assert old in text
        new = text.replace(old, new)
    (folder / "config.yaml").write_bytes(new.encode() if isinstance(new, str) else new)
    with pytest.raises(UserError, match=message) as error:
        run_folder.load_run_config(folder)
    assert str(folder / "config.yaml") in str(error.value)


def test_the_config_of_a_run_whose_data_are_gone_is_read(run):
    config = run.config.model_copy(
        update={"data": run.config.data.model_copy(update={"image_dir": Path("/no/such/folder")})}
    )
    (config.output_dir / "model").mkdir(parents=True)
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    assert run_folder.load_run_config(config.output_dir) == config


def test_a_folder_is_replaced_whole_or_not_at_all_and_keeps_what_is_the_users(tmp_path):
    target = tmp_path / "pipeline"
    with atomic.replacing_folder(target) as fresh:
        (fresh / "unet").mkdir()
        (fresh / "unet" / "old.bin").touch()
        assert not target.exists()
    (target / "notes.txt").write_text("mine")

    def fail():
        with atomic.replacing_folder(target) as fresh:
            (fresh / "unet").mkdir()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (target / "unet" / "old.bin").exists()
    with atomic.replacing_folder(target) as fresh:
        (fresh / "unet").mkdir()
        (fresh / "unet" / "new.bin").touch()
    assert [path.name for path in (target / "unet").iterdir()] == ["new.bin"]
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    atomic.write_atomic(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_atomic(tmp_path / "a.json", "new \ud800")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_names_aside_are_unique_and_what_a_kill_leaves_of_them_is_removed_by_the_next_run(tmp_path):
    for name in ("pipeline", "config.yaml", "pytorch_lora_weights.safetensors"):
        first, second = atomic.aside(tmp_path / name), atomic.aside(tmp_path / name)
        assert first != second
        first.mkdir()
        (first / "half").touch()
        second.touch()
    (tmp_path / ".mine.tmp").touch()
    assert files_to_upload(tmp_path) == []
    with run_folder.lock_run_folder(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {".mine.tmp", ".lock", ".owner"}


def test_no_other_module_spells_a_name_of_the_run_folder():
    names = {
        value
        for key, value in vars(run_folder).items()
        if key.endswith("_NAME") and isinstance(value, str)
    }
    names |= {run_folder.CLASS_PICTURES, run_folder.PIPELINE}
    spelled = []
    files = [*ROOT.glob("trainers/**/*.py"), *ROOT.glob("scripts/*.py")]
    # a value of a key may be called as a folder is
    files = [path for path in files if path.parent.name != "config"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            words = re.split(r"[\s/]", node.value) if is_text and "\n" not in node.value else []
            # a message or a help text may speak of it
            if len(words) <= 2 and names & set(words) and path.name != "run_folder.py":
                spelled.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    assert spelled == []
