"""The attention kernel that is asked for computes, and is gone afterwards."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


class Calls(TorchFunctionMode):
    """Whether each call of attention has dropout, which the CPU's fused kernel cannot do, and
    whether a fused kernel computed it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = set()

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                names.add(operation.overloadpacket.__name__)
                return operation(*args, **(kwargs or {}))

        with Names():
            output = function(*args, **kwargs)
        is_fused = any(name.startswith("_scaled_dot_product_flash") for name in names)
        self.seen.append((bool(kwargs.get("dropout_p")), is_fused))
        return output


@pytest.mark.parametrize("kernel", ["auto", "flash"])
def test_a_call_that_a_kernel_cannot_take_leaves_it_to_the_others(settings, kernel):
    """CLIP's masked calls, some of them with dropout, between those of the denoiser: each call is
    decided by itself, and none of them gives the kernel up for the run."""
    config = settings("train.train_text_encoder=true", family="sd3")
    task, batches = build(config)
    layers = [m for m in task.module.text_encoders.modules() if hasattr(m, "is_causal")]
    assert layers
    layers[0].dropout = 0.5
    with attention_kernel(kernel, torch.device("cpu")), Calls() as calls:
        gradients(task, batches)
    assert {fused for dropped, fused in calls.seen if dropped} == {False}
    assert {fused for dropped, fused in calls.seen if not dropped} == {True}
    assert len(calls.seen) > len(layers)
    # those of the denoiser come last
    assert calls.seen[-1] == (False, True)
