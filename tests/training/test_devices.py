"""What a GPU or another system would look at first, as far as a CPU can show it."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.shared.processes import ROOT
from trainers import run_folder
from trainers.config import ImagesConfig, OptimizerConfig, TrainConfig
from trainers.data.pictures import Picture
from trainers.data.sampler import BatchSlice
from trainers.errors import RunFailedError
from trainers.from_scratch import classifier
from trainers.from_scratch.image_sets import ImageBatches, ImageSample, ImageSet
from trainers.metrics import image_quality
from trainers.publishing import model_card
from trainers.run import run
from trainers.training.failures import friendly_errors
from trainers.training.loop import make_player, train
from trainers.training.nonfinite import is_finite
from trainers.training.optimizers import make_optimizer


class Away(Tensor):
    """A tensor of another device: it does not mix with plain ones, and `cpu` brings it here."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        if any(type(x) is Tensor and x.dim() for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{function.__name__}: tensors on two devices")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_average_is_made_where_the_weights_are_trained():
    """`prepare` moves the module; here to the meta device."""
    module = nn.Linear(2, 2)
    moves = SimpleNamespace(
        distributed_type=None, prepare=lambda module, optimizer: (module.to("meta"), optimizer)
    )
    player = make_player(
        module, [{"params": list(module.parameters()), "lr": 1.0}], OptimizerConfig(), 0.9, moves
    )
    assert {value.device.type for value in player.ema.average.values()} == {"meta"}
    player.ema.update(1)


def test_distances_are_measured_in_features_of_another_device():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 1, 4, 4, generator=generator) for _ in range(2))
    here = image_quality.distribution_metrics(x, y, lambda part: part.flatten(1))
    there = image_quality.distribution_metrics(x, y, lambda part: part.flatten(1).as_subclass(Away))
    assert here == pytest.approx(there)


def test_a_checkpoint_of_a_gpu_is_read_without_one(settings, monkeypatch):
    four = settings("train.max_train_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run(four)
    assert run_folder.list_checkpoints(four.output_dir / "checkpoints")
    run(settings("train.max_train_steps=4"))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.uint8]
)
def test_weights_of_any_precision_are_looked_at(dtype):
    assert is_finite(torch.ones(3).to(dtype)).all()


def test_eight_bit_floats_that_are_not_finite_are_found():
    assert is_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)).tolist() == [
        True,
        False,
    ]


def test_a_classifier_unscales_gradients_that_were_scaled_for_float16(monkeypatch):
    """Else its steps follow gradients 65,536 times too large, clipped."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (32, 1, 16, 16), generator=generator, dtype=torch.uint8)
    samples = [ImageSample(Picture(str(i), bytes, ""), label=i % 2) for i in range(32)]
    images = ImageSet(samples, lambda sample: pixels[int(sample.picture.name)], True, "cpu")
    optimizer, norms = OptimizerConfig(learning_rate=3e-3), {}
    for name, scaler in (
        ("plain", None),
        ("scaled", torch.amp.GradScaler("cpu", init_scale=65536.0)),
    ):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler, accelerator.native_amp = scaler, True
        if scaler:  # what a GPU's accelerator says of itself
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        task, found = (
            classifier.ClassifierTask(images, 0, optimizer, accelerator),
            norms.setdefault(name, []),
        )
        batches = ImageBatches(
            images, ImagesConfig(image_dir=".", resolution=16, channels=1), BatchSlice(0, 16)
        )

        def note(step, metrics, found=found):
            found.append(metrics["classifier_grad_norm"].item())

        train(
            task, batches, TrainConfig(max_train_steps=3), 0, accelerator, lambda step: 1.0, [note]
        )
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=1e-3)


@pytest.mark.slow
def test_steps_in_one_process_are_measured_for_every_family_and_option():
    """With a renamed attribute each cell of ours failed, and the script told of success."""
    script = [sys.executable, "scripts/benchmark", "--inside", "--device=cpu", "--steps=1"]
    cells = ["sd15-512-bs4", "sd3-1024-bs1-modulation_cache", "flux-1024-bs1-selective"]
    done = subprocess.run(
        [*script, "--size", "tiny", *cells], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    assert machine["matmul_tflops"] > 0
    assert [line["equal"] for line in lines[:3]] == [True] * 3
    assert [set(line) & {"ours", "scripts"} for line in lines[3:]] == [
        {"ours", "scripts"},
        {"ours"},
        {"ours"},
    ]
    for row in [lines[3]["scripts"], *(line["ours"] for line in lines[3:])]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
        assert row["mfu_percent"] > 0


@pytest.mark.slow
def test_the_benchmark_finds_our_step_equal_and_times_it(tmp_path):
    """A rename had lost a name by which its gate cuts the photos as the task does."""
    script = [sys.executable, "scripts/benchmark", "--family=sd3", "--device=cpu", "--steps=3"]
    done = subprocess.run(
        [*script, "--rounds=1", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["cases"]["sd3 tiny"]
    assert found["checks"]["ours"]["equal"]
    assert found["rounds"]["ours"][0]["step"] > 0


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_way_of_running_out_of_memory_is_known(settings, words):
    with pytest.raises(RunFailedError, match="out of memory"), friendly_errors(settings(), 1):
        raise RuntimeError(words)


def test_a_checkout_that_is_not_installed_can_write_its_card(monkeypatch):
    def version(name):
        if name == "diffusion-trainers":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(model_card, "version", version)
    assert model_card.package_versions()["diffusion-trainers"] == "not installed"
    assert model_card.package_versions()["torch"] == "1"


def test_every_module_can_be_imported_on_windows():
    """Which has no fcntl, no resource and no SIGUSR1."""
    script = """
import importlib, pkgutil, signal, sys
import bitsandbytes, datasets, diffusers, kornia, peft, sklearn, torch, torchmetrics, transformers
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1
import trainers
for module in pkgutil.walk_packages(trainers.__path__, "trainers."):
    importlib.import_module(module.name)
    print(module.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "trainers.run" in done.stdout.split()


def test_what_the_optimizer_is_called_with_is_what_the_package_can_do():
    """bitsandbytes from 0.48 on; the lowest version that is allowed stands in pyproject.toml."""
    assert "bitsandbytes>=0.50" in (ROOT / "pyproject.toml").read_text()
    assert make_optimizer(OptimizerConfig(), [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_a_script_reads_its_arguments_without_torch(name):
    """So that a mistake in them is told in less than a second."""
    script = (
        f"import sys; sys.path.insert(0, 'scripts'); import {name}; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
