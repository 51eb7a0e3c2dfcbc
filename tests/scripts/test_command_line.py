"""Every script explains itself, and tells in plain lines what is wrong or not finished."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.shared.processes import ROOT, call

SCRIPTS = sorted(
    str(path.relative_to(ROOT / "scripts"))
    for pattern in ("*.py", "results/*.py", "small_world/build.py", "benchmark/true_size.py")
    for path in (ROOT / "scripts").glob(pattern)
    if path.name not in ("common.py", "plain_loops.py", "quality_recipes.py", "textures.py")
)


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmark"])
def test_help_is_printed_and_nothing_is_run(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts" / Path(script).parent)
    assert call(script, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--steps=3"], ["train.max_train_steps=0"]])
def test_the_quickstart_reads_options_without_a_config(options, capsys):
    assert call("quickstart.py", *options) == 2
    assert options[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("script", ["generate.py", "export.py", "evaluate.py", "push.py"])
def test_a_run_that_was_stopped_is_called_unfinished(settings, script, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = settings()
    folder = config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text((folder.parent / "config.yaml").read_text())
    options = ["--prompt", "a b c"] if script == "generate.py" else []
    assert call(script, folder, *options) == 2
    message = capsys.readouterr().err
    assert f"{folder} is not finished" in message
    assert "starts from step 0" in message
    (folder / "checkpoints/step-000004").mkdir(parents=True)
    assert call(script, folder, *options) == 2
    assert "goes on from its checkpoint step-000004" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["=3", "seed", "train.=3", "extra.yaml"])
def test_an_override_without_a_name_or_a_value_is_told_its_form(override, capsys):
    assert call("train.py", ROOT / "configs/quickstart.yaml", override) == 2
    assert (
        f"{override}: an override must have the form section.key=value" in capsys.readouterr().err
    )


def test_only_what_is_missing_is_called_required(capsys):
    assert call("train.py") == 2
    assert "required: config\n" in capsys.readouterr().err


def test_a_warning_is_one_plain_line_until_the_script_ends():
    script = """
import warnings
from trainers import cli
before = warnings.formatwarning
cli.run_main(lambda: warnings.warn("the disk\\n  is slow", stacklevel=1))
print(warnings.formatwarning is before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("warning: the disk is slow\n", "True\n")


def test_libraries_add_no_notices_to_what_a_script_says(bases, tmp_path):
    """They come with the import that recognizes a base; here the file is the only mistake."""
    file = tmp_path / "empty.safetensors"
    save_file({}, file)
    command = [sys.executable, "scripts/export.py", file, "--base", bases["sd15"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(str(file))
