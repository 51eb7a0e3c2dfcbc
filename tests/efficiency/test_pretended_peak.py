"""The plan's peak of a step is that of the step on a pretended GPU, but for the batch."""

import pytest
from accelerate.state import AcceleratorState

from tests.pretend_cuda import PretendCuda
from tests.shared.by_hand import by_hand_but
from trainers import dreambooth
from trainers.distributed.accelerator import PRECISION_NAMES, make_accelerator
from trainers.memory_plan import plan_memory
from trainers.training.loop import train

CASES = {
    "sd15-bf16": "train.gradient_checkpointing=true",
    "sd15-no": "train.ema_decay=null",
    "sd3-fp16": "train.gradient_checkpointing=selective",
    "sd3-bf16": "model.quantization=fp8 train.gradient_checkpointing=true",
    "flux-bf16": "model.offload=true train.gradient_checkpointing=true",
    "flux-fp16": "model.quantization=nf4",
    "flux-no": "model.modulation_cache=true",
}
CASES_EACH_TIME = ("sd15-no", "flux-bf16")
BATCH_TENSORS = 8  # as large as the latents: noise, target, what the objective computes


def precomputed_bytes(family):
    """What the modulation cache holds ready."""
    outputs = family.modulation.precomputed.values() if family.modulation else []
    return sum(x.untyped_storage().nbytes() for layers in outputs for x in layers)


@pytest.mark.parametrize("case", by_hand_but(CASES_EACH_TIME, CASES))
def test_the_plan_is_the_peak_of_a_step(settings, case, monkeypatch):
    monkeypatch.setattr(dreambooth, "STEPS_PRECOMPUTED", 3)
    family_name, precision = case.split("-")
    options = ("data.resolution=32", "data.buckets=false", "train.max_train_steps=3")
    config = settings(
        *options, f"train.mixed_precision={precision}", *CASES[case].split(), family=family_name
    )
    with PretendCuda() as gpu:
        accelerator, _ = make_accelerator(config)
        task, batches, _ = dreambooth.build(config, accelerator)
        latents = task.draw_inputs(*next(iter(batches(0))))[0]
        slack = BATCH_TENSORS * latents.numel() * latents.itemsize
        del latents
        gpu.memory.reset_peak()
        peaks = []

        def note(step, metrics):
            peaks.append(gpu.memory.peak_bytes - precomputed_bytes(task.family))

        train(task, batches, config.train, 0, accelerator, lambda step: 1.0, [note])
    AcceleratorState._reset_state(reset_partial_state=True)
    dtype = next(dtype for dtype, name in PRECISION_NAMES.items() if name == precision)
    planned = plan_memory(config, dtype, has_cpu_memory=True).phases["train"]
    assert 0 <= max(peaks) - planned <= slack + 0.05 * planned
