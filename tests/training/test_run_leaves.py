"""A run leaves its process as it found it."""

import gc
import os
import signal
import warnings

import pytest
import torch

from tests.pretend_cuda import PretendCuda
from trainers.run import run

SIGNALS = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]


def backends():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


def state_of_the_process():
    return {
        "handlers": {number: signal.getsignal(number) for number in SIGNALS},
        "kernels": torch.nn.attention._cur_sdpa_kernel_backends(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "threads": torch.get_num_threads(),
        "backends": backends(),
    }


def test_two_runs_in_a_row_leave_handlers_kernels_environment_and_filters(settings, tmp_path):
    def once(name):
        run(
            settings(
                "train.max_train_steps=2", "train.attention=math", f"output_dir={tmp_path}/{name}"
            )
        )

    once("first")  # libraries prepare themselves when they are used for the first time
    before = state_of_the_process()
    once("second")
    once("third")
    assert state_of_the_process() == before


@pytest.mark.parametrize(("precision", "uses_tf32"), [("bf16", True), ("no", False)])
def test_on_a_gpu_float32_parts_of_half_precision_use_tf32_and_nothing_is_timed(
    settings, monkeypatch, precision, uses_tf32
):
    """On a pretended one; and the settings are as before when the run is over, or has failed."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, inside = backends(), []

    def note(*_):
        inside.append(backends())
        raise RuntimeError("enough")

    monkeypatch.setattr("trainers.run.train", note)
    with PretendCuda(), pytest.raises(RuntimeError, match="enough"):
        run(settings(f"train.mixed_precision={precision}"))
    assert inside == [(uses_tf32, True, False)]
    assert backends() == before
