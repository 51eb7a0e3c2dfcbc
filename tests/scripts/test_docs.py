"""README, docs and configs say what can be typed: commands, overrides, snippets, links, pages."""

import re
import subprocess
import sys

import pytest

from documentation import code_blocks, commands, mistakes, pages
from tests.shared.processes import ROOT
from trainers.config import KINDS
from trainers.config.loading import known_paths

DOCUMENTS = [*code_blocks.markdown_files(), *code_blocks.config_files()]
# of a run on the small world, so that it is done in seconds
SHORT = (
    "train.max_train_steps=2 train.train_batch_size=1 "
    "checkpoint.checkpointing_steps=1 optimizer.lr_warmup_steps=0 validation.num_images=1 "
    "validation.num_inference_steps=2 validation.validation_steps=2 tracking.report_to=[]"
)
RUNNABLE = re.compile(r"python scripts/(generate|export|report|plan|import_config)\.py ")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_says_what_can_be_typed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check = mistakes.markdown_mistakes if path.suffix == ".md" else mistakes.config_file_mistakes
    assert list(check(path)) == []


def test_generated_pages_are_up_to_date():
    assert pages.stale_pages() == []


def test_the_reference_has_every_key_of_every_kind():
    for kind, model in KINDS.items():
        text = (ROOT / f"docs/reference/{kind}.md").read_text("utf-8")
        sections = {f"## {path}" for path in known_paths(model)}
        missing = [
            path
            for path in known_paths(model)
            if f"| `{path}` |" not in text and f"## {path}" not in text.splitlines()
        ]
        assert missing == []
        assert sections & set(text.splitlines())


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("python scripts/trian.py configs/quickstart.yaml", "scripts/trian.py does not exist"),
        ("python scripts/train.py configs/quikstart.yaml", "does not exist"),
        ("python scripts/train.py configs/quickstart.yaml lora.rnak=4", "did you mean lora.rank"),
        ("python scripts/train.py configs/quickstart.yaml lora.rank=0", "greater than or equal"),
        ("python scripts/train.py configs/quickstart.yaml --steps 3", "unknown options --steps"),
        ("python scripts/export.py runs/rex --format kohja", "invalid choice"),
        ("python scripts/export.py runs/rex [--rnak 4]", "unrecognized arguments"),
        ("python scripts/generate.py runs/rex", "required: --prompt"),
        ("python tests/drill.py --kill 3", "tests/drill.py has no --kill"),
        ("accelerate launch --muti_gpu scripts/train.py configs/quickstart.yaml", "muti_gpu"),
        ("accelerate launch --config_file accelerate_configs/x.yaml scripts/train.py C", "x.yaml"),
        ("accelerate launch scripts/trian.py configs/quickstart.yaml", "trian.py does not exist"),
        ("make quikstart", "make has no target quikstart"),
        ("python -m trainers.config.laoding", "does not exist"),
        ("python -m pytest tests/lora/test_no.py", "does not exist"),
        ("sbatch scripts/train.sbatch configs/quickstart.yaml lora.rnak=4", "lora.rank"),
        ('python scripts/generate.py runs/rex --prompt "a', "cannot be parsed"),
        ("pyhton scripts/train.py", "no program"),
    ],
)
def test_a_command_that_cannot_be_given_is_noticed(command, mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert mistake in " ".join(commands.command_mistakes(command))


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("```python\nx = (\n```", "does not compile"),
        ("```python\nfrom trainers.errors import Nothing\n```", "has no Nothing"),
        ("```yaml\nlora:\n  rnak: 4\n```", "did you mean lora.rank"),
        ("set `lora.rnak=4`", "no config has the key lora.rnak"),
        ("set `lora.rank=none`", "lora.rank does not take none"),
        ("see [this](nowhere.md)", "nowhere.md is not there"),
        ("```bash\nmake \\\n  nothing\n```", "make has no target nothing"),
        ("type `make nothing`", "make has no target nothing"),
    ],
)
def test_what_is_wrong_in_a_page_is_noticed(text, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(code_blocks, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(f"one line\n\n{text}\n", "utf-8")
    (found,) = mistakes.markdown_mistakes(path)
    assert found.startswith("page.md:")
    assert mistake in found


def run(folder, command):
    words = [sys.executable, *commands.shlex.split(command, comments=True)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_commands_of_the_documents_run_on_the_small_world(tmp_path):
    """Those on runs/rex, after a short training there, and those that need no training."""
    for name in ("scripts", "configs", "trainers", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    run(tmp_path, f"python scripts/train.py configs/quickstart.yaml output_dir=runs/rex {SHORT}")
    typed = {}
    for path in code_blocks.markdown_files():
        for piece in code_blocks.commands(path):
            for command in commands.variants(piece.text):
                if RUNNABLE.match(command) and not commands.PLACEHOLDER.search(command):
                    typed.setdefault(command, piece.place)
    # true bases are not at hand
    there = [command for command in typed if "runs/rex" in command]
    assert len(there) >= 6
    for command in there:
        run(tmp_path, command)
