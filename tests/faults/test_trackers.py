"""A tracker or samples that fail do not end the training."""

import re
import socket

import pytest
from accelerate.tracking import TensorBoardTracker

from tests.shared.disturbed_runs import assert_same, metrics
from trainers import dreambooth
from trainers.run import run


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        *(
            (TensorBoardTracker, name, "the tracker")
            for name in ("__init__", "start", "log", "log_images", "finish")
        ),
        (dreambooth, "write_samples", "sampling"),
    ],
)
def test_a_tracker_or_samples_that_fail_cost_a_warning_and_nothing_else(
    make, finished, warning_text, monkeypatch, owner, name, what
):
    shared = ("lora.dropout=0.3", "validation.prompts=[a]", "validation.validation_steps=2")
    settings, whole = make(*shared, "tracking.report_to=[tensorboard]"), finished(*shared)
    monkeypatch.setattr(owner, name, lambda *_, **__: socket.create_connection(("127.0.0.1", 0)))
    run(settings)
    assert re.search(
        rf"^{what} failed \(\w*Error: .*\); training goes on$", warning_text(), re.MULTILINE
    )
    assert metrics(settings) == metrics(whole)
    assert_same(settings, whole)
