"""The task of a DreamBooth run before its first step, and the memory that its steps take."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trainers import dreambooth
from trainers.memory_plan import MemoryMeter
from trainers.training.loop import train


@pytest.fixture
def build(settings):
    """A function: overrides, family -> the task of such a config, before its first step."""

    def make(*overrides, family="sd15"):
        AcceleratorState._reset_state(reset_partial_state=True)
        return dreambooth.build(settings(*overrides, family=family), Accelerator(cpu=True))[0]

    return make


def real_peak(settings):
    """Bytes at the peak of two real steps, counted by the plan's meter on real tensors."""
    with MemoryMeter() as meter:
        task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
        start = sum(p.untyped_storage().nbytes() for p in task.module.parameters())
        batch = list(batches(0))
        meter.peak_bytes = before = meter.live_bytes
        train(task, lambda step: batch, settings.train, 0, task.accelerator, lambda step: 0.0)
        return start + meter.peak_bytes - before
