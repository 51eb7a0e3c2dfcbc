"""A run leaves its process as it found it."""

import gc
import os
import signal
import warnings

import torch

from trainers.run import run

SIGNALS = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]


def state_of_the_process():
    return {
        "handlers": {number: signal.getsignal(number) for number in SIGNALS},
        "kernels": torch.nn.attention._cur_sdpa_kernel_backends(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "threads": torch.get_num_threads(),
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
