"""Recomputing activations changes memory and time, and no bit of what is trained."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.shared.blocks import CHECKPOINTED, DROPOUT, FAMILIES, SELECTIVE, build, gradients
from tests.shared.runs import PRIOR
from trainers.errors import UserError
from trainers.memory_plan import MemoryMeter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [(), (DROPOUT,), ("lora.target_modules=attention+mlp", *PRIOR)])
def test_recomputing_changes_no_bit(settings, family, more):
    plain = gradients(*build(settings(*more, family=family)))
    for kind in (CHECKPOINTED, SELECTIVE):
        again = gradients(*build(settings(kind, *more, family=family)))
        assert plain.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in plain.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_keeps_less_than_all_and_recomputes_less_than_everything(settings, family):
    kept, flops = {}, {}
    for kind in ("false", "selective", "true"):
        shape = ("data.resolution=32", "train.train_batch_size=8")
        chosen = settings(f"train.gradient_checkpointing={kind}", *shape, family=family)
        task, ((batch, rng),) = build(chosen)
        with MemoryMeter() as meter:
            for tensor in (*task.module.parameters(), *task.module.buffers()):
                meter.count(tensor.untyped_storage())
            before = meter.live_bytes
            ((_, loss),) = task.losses(batch, rng)
            kept[kind] = meter.live_bytes - before
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[kind] = counter.get_total_flops()
    assert kept["true"] < kept["selective"] < 0.9 * kept["false"]
    assert flops["false"] < flops["selective"] < flops["true"]


@pytest.mark.parametrize("whole", ["model.quantization=fp8", "model.offload=true"])
def test_weights_that_come_and_go_need_every_block_checkpointed(settings, whole):
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: true"):
        settings(whole, SELECTIVE, family="flux")
