"""Denoisers with block options, and their loss and gradients."""

import torch
from accelerate import Accelerator

from trainers import dreambooth
from trainers.distributed.trained_weights import trainable_parameters

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
DROPOUT, CHECKPOINTED = "lora.dropout=0.3", "train.gradient_checkpointing=true"
SELECTIVE, COMPILED = "train.gradient_checkpointing=selective", "train.compile=true"


def build(settings):
    """A task with B not at its zero start, its first batches, and the gradients of all of them with
    their losses."""
    task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(task.module).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task.module.train() and task, list(batches(0))


def gradients(task, batches):
    total = 0
    for batch, rng in batches:
        torch.manual_seed(7)
        ((_, loss),) = task.losses(batch, rng)
        loss.backward()
        total += loss.detach()
    found = {name: p.grad for name, p in trainable_parameters(task.module).items()}
    task.module.zero_grad()
    return {"loss": total, **found}


def assert_close(plain, fast):
    torch.testing.assert_close(fast["loss"], plain["loss"], rtol=1e-6, atol=0)
    assert plain.keys() == fast.keys()
    one, other = (
        torch.cat([value.flatten().double() for value in part.values()]) for part in (plain, fast)
    )
    assert torch.cosine_similarity(one, other, dim=0) > 0.99999
    torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-5, atol=0)
