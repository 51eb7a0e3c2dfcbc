"""A base of true size is written as it is released, and trained on by the users' command."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmark import readers, shards
from benchmark.sizes import SIZES
from reference.models import PIPELINES
from tests.shared.processes import call
from trainers.lora.base_layers import text_prefix

SHARD_BYTES = 2**13


@pytest.mark.parametrize("family", SIZES)
def test_what_is_written_is_loaded_to_the_last_tensor(family, tmp_path):
    parts = shards.meta_parts(family, SIZES[family]["tiny"])
    shards.write_base(family, parts, tmp_path, SHARD_BYTES)
    pipe = PIPELINES[family].from_pretrained(tmp_path, dtype=torch.bfloat16)
    written_bytes = 0
    for name, part in shards.models_of(parts).items():
        files = list((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 1
        assert len(list((tmp_path / name).glob("*.safetensors.index.json"))) == 1
        written = {key: value for file in files for key, value in load_file(file).items()}
        written_bytes += sum(value.nbytes for value in written.values())
        model = getattr(pipe, name)
        loaded = {text_prefix(model) + key: value for key, value in model.state_dict().items()}
        assert written.keys() == shards.stored_tensors(part).keys()
        assert written.keys() <= loaded.keys()
        assert all(torch.equal(value, loaded[key]) for key, value in written.items())
        assert all(value.isfinite().all() for value in loaded.values())
    assert written_bytes == shards.bytes_on_disk(parts)


@pytest.mark.slow
def test_the_command_trains_proves_and_counts(tmp_path, capsys):
    assert call("benchmark/true_size.py", "flux", "--size", "tiny", "--folder", tmp_path) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| flux")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0].endswith("bf16, model.quantization=nf4 train.gradient_checkpointing=true")
    step, peak, planned, proof = (float(cells[number]) for number in (2, 4, 5, 7))
    assert step > 0
    # the tensors are small, so both are the libraries
    assert peak > 0.2
    assert planned > 0.2
    assert proof < 0.03
    taken = dict(text.split(" ", 1) for text in cells[8].split("; "))
    assert taken.keys() == {"diffusers", "ComfyUI"}
    for text in taken.values():
        found, total = text.split(" of ")
        assert found == total != "0"
    # nothing is left behind
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 10**8))
    assert call("benchmark/true_size.py", "sd15", "--size", "tiny", "--folder", tmp_path) == 2
    assert "sd15 takes 1 GB of disk, and" in capsys.readouterr().err


def test_a_tensor_that_no_reader_knows_is_not_counted(tmp_path):
    weights = {f"transformer.{name}.lora_A.weight": torch.zeros(1) for name in ("a", "b")}
    shards.save_file(weights, tmp_path / "lora.safetensors")
    known = readers.joined(["transformer.a"], ["lora_A.weight", "lora_B.weight"])
    assert readers.count(tmp_path / "lora.safetensors", known) == (1, 2)
