"""The attention kernel that is asked for computes, and is gone afterwards."""

from contextlib import nullcontext

import pytest
import torch

from tests.shared.blocks import CHECKPOINTED, assert_close, build, gradients
from trainers.efficiency.attention import attention_kernel
from trainers.errors import UserError
from trainers.run import run


def used(task, batches, kernel="auto"):
    """Whether a step runs PyTorch's fused attention; and its gradients."""
    seen = set()

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with attention_kernel(kernel, torch.device("cpu")), Ops():
        found = gradients(task, batches)
    return any(name.startswith("_scaled_dot_product_flash") for name in seen), found


@pytest.mark.parametrize("more", [(), (CHECKPOINTED,)])
def test_the_kernel_that_is_asked_for_computes_and_is_gone_afterwards(settings, more):
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    is_fused, explicit = used(*build(settings(*more, family="sd3")), "math")
    assert not is_fused
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before
    is_fused, fused = used(*build(settings(*more, family="sd3")), "flash")
    assert is_fused
    assert_close(fused, explicit)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_run_here_is_refused(settings, kernel):
    with pytest.raises(UserError, match=f"train.attention: {kernel} cannot run on cpu"):
        run(settings(f"train.attention={kernel}"))


def test_a_run_uses_the_kernel_that_its_config_names(settings, monkeypatch):
    asked = []

    def noting(name, device):
        asked.append((name, device.type))
        return nullcontext()

    monkeypatch.setattr("trainers.run.attention_kernel", noting)
    run(settings("train.attention=math", "train.max_train_steps=1"))
    assert asked == [("math", "cpu")]
