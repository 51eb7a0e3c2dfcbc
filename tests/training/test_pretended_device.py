"""The pretended GPU refuses what CUDA refuses, lists where the host waits, and computes alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.pretend_cuda import PretendCuda
from tests.shared.pretended_runs import OPTIONS, SMALL, unexpected_waits
from tests.shared.pretended_tensors import DeviceMixError
from tests.shared.runs import assert_same
from trainers.data import transfer
from trainers.data.rng import SampleRng
from trainers.run import run
from trainers.training import loop
from trainers.training.averages import EMA
from trainers.training.optimizers import make_optimizer


@pytest.fixture
def gpu():
    with PretendCuda() as gpu:
        yield gpu


def there(*shape):
    return torch.zeros(*shape, device="cuda")


REFUSED = {
    "sum": lambda: there(2) + torch.zeros(2),
    "cat": lambda: torch.cat([there(2), torch.zeros(2)]),
    "in place": lambda: torch.zeros(2).add_(there(2)),
    "index": lambda: torch.zeros(2)[there(1).long()],
    "layer": lambda: nn.Linear(2, 2)(there(1, 2)),
    "where": lambda: torch.where(there(2) > 0, there(2), torch.ones(2)),
    "generator": lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
    "generator of the GPU": lambda: torch.randn(2, generator=torch.Generator("cuda")),
    "generator in place": lambda: there(2).normal_(generator=torch.Generator()),
    "numpy": lambda: there(2).numpy(),
    "pinned": lambda: there(2).pin_memory(),
    "average": lambda: torch._foreach_lerp_([torch.zeros(2)], [there(2)], 0.5),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_cuda_refuses_is_refused_and_noted(gpu, call):
    with pytest.raises(DeviceMixError):
        call()
    assert len(gpu.memory.mixes) == 1


WAITS = {
    "item": (lambda: there(1).item(), "a value is read: item, bool, int or float"),
    "bool": (lambda: bool(there(1)), "a value is read: item, bool, int or float"),
    "cpu": (lambda: there(1).cpu(), "a copy to the CPU"),
    "to": (lambda: there(1).to("cpu", torch.float16), "a copy to the CPU"),
    "list": (lambda: there(2).tolist(), "tolist"),
    "nonzero": (lambda: there(2).nonzero(), "nonzero"),
    "where": (lambda: torch.where(there(2) > 0), "nonzero"),
    "mask": (lambda: there(2)[there(2) > 0], "an index by a mask"),
    "list as index": (lambda: there(2)[[0, 1]], "an index of the CPU"),
    "numbers": (lambda: torch.tensor([1, 2], device="cuda"), "a tensor of numbers of the host"),
    "unpinned": (lambda: torch.zeros(2).to("cuda", non_blocking=True), "a copy of unpinned memory"),
    "waiting": (lambda: torch.zeros(2).pin_memory().cuda(), "a copy that is not non_blocking"),
    "into": (lambda: there(2).copy_(torch.zeros(2)), "a copy of unpinned memory"),
}


@pytest.mark.parametrize(("call", "what"), WAITS.values(), ids=WAITS)
def test_where_the_host_waits_is_listed(gpu, call, what):
    call()
    assert [wait.what for wait in gpu.memory.waits.elements()] == [what]


FREE = {
    "number": lambda: 2 * there(2) + torch.tensor(1.0),
    "factories": lambda: torch.arange(3, device="cuda") + torch.ones(3, device=0),
    "likes": lambda: torch.rand_like(there(2)) + there(2).new_ones(2),
    "pinned": lambda: torch.zeros(2).pin_memory().to("cuda", non_blocking=True) + there(2),
    "sent": lambda: transfer.send_numbers([1, 2], "cuda") + there(2),
    "one hot": lambda: F.one_hot(there(2).long(), 3) + there(2, 3),
    "generator": lambda: torch.randn(2, generator=torch.Generator("cuda"), device="cuda"),
    "row": lambda: there(2, 2)[1] + there(2)[:],
}


@pytest.mark.parametrize("call", FREE.values(), ids=FREE)
def test_what_waits_for_nothing_is_not_listed(gpu, call):
    made = call()
    assert made.device == torch.device("cuda", 0)
    assert made.is_cuda
    assert not gpu.memory.waits


def test_gradients_come_back_over_a_move_and_through_recomputed_layers(gpu):
    weight = torch.ones(2, requires_grad=True)
    x = weight.to("cuda", non_blocking=True)
    layer = nn.Linear(2, 2).to("cuda")
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert weight.grad.device.type == "cpu"
    assert layer.weight.grad.device.type == "cuda"
    assert torch.equal(layer.weight.grad.cpu(), torch.ones(2, 2))


def test_live_bytes_are_those_of_the_tensors_that_are_held(gpu):
    kept = there(100)
    gone = there(1000).exp()
    assert gpu.memory.live_bytes == 4400
    del gone
    assert torch.cuda.memory_allocated() == 400
    assert torch.cuda.max_memory_allocated() == 8400
    assert kept.sum().cpu() == 0


def test_everything_is_as_before_when_it_is_over():
    names = ("to", "device", "numpy", "new_zeros")
    before = [getattr(torch.Tensor, name) for name in names], torch.zeros, torch.Generator
    with PretendCuda():
        assert torch.cuda.is_available()
    assert ([getattr(torch.Tensor, name) for name in names], torch.zeros, torch.Generator) == before
    assert torch.zeros(1).device.type == "cpu"
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("sd15", "train.ema_decay=0.9", marks=pytest.mark.slow),
        pytest.param(
            "sd3",
            "model.offload=true train.gradient_checkpointing=true",
            marks=pytest.mark.slow,
        ),
        ("flux", "model.modulation_cache=true validation.prompts=[a] validation.num_images=1"),
    ],
)
def test_a_run_in_float32_gives_what_it_gives_on_the_cpu(settings, tmp_path, family, options):
    """The ways that only a GPU takes, such as pinned copies on their own stream, change nothing."""
    options = (*options.split(), "train.mixed_precision=no")
    here = settings(*options, family=family)
    run(here)
    away = settings(*options, f"output_dir={tmp_path}/away", family=family)
    with PretendCuda() as gpu:
        run(away)
    assert_same(here, away)
    # nor do frozen weights wait while it samples
    assert not [wait for wait in gpu.memory.waits if wait.place.startswith("efficiency/")]
    for path in (here.output_dir / "samples").rglob("*.png"):
        other = away.output_dir / "samples" / path.relative_to(here.output_dir / "samples")
        assert path.read_bytes() == other.read_bytes()


def test_an_average_that_is_made_before_the_module_moves_is_found(sources, monkeypatch, gpu):
    def make_player(module, groups, optimizer, ema_decay, accelerator):
        ema = EMA(module, ema_decay)
        return loop.Player(*accelerator.prepare(module, make_optimizer(optimizer, groups)), ema)

    monkeypatch.setattr("trainers.from_scratch.task.make_player", make_player)
    case = "unet-no-pix2pix"
    with pytest.raises(DeviceMixError, match="_foreach_lerp_"):
        run(sources.config(case, SMALL[case]))


def test_a_generator_of_the_cpu_is_found(sources, monkeypatch, gpu):
    on_cpu = property(lambda rng: [torch.Generator().manual_seed(row) for row in rng.rows])
    monkeypatch.setattr(SampleRng, "generators", on_cpu)
    case = "unet-bf16-restore"
    with pytest.raises(DeviceMixError, match="a cpu generator for a cuda tensor"):
        run(sources.config(case, SMALL[case]))


@pytest.mark.parametrize("case", ["unet-bf16-restore", "sd15-fp16-text-encoder"])
def test_an_unpinned_copy_in_the_loop_is_found(sources, monkeypatch, gpu, case):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    run(sources.config(case, (SMALL | OPTIONS)[case]))
    found = unexpected_waits(gpu.memory)
    assert {what.partition(": ")[2] for what in found} == {"a copy of unpinned memory"}
