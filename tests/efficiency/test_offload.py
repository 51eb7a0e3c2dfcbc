"""Offloading changes where frozen blocks are, and no bit of what is trained."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.shared.runs import CACHED, assert_same, run_steps
from trainers.distributed.accelerator import make_accelerator
from trainers.efficiency.offload import BlockOffload
from trainers.errors import UserError
from trainers.run import run

OFFLOADED = ("train.gradient_checkpointing=true", "model.offload=true")


@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("sd3", (), marks=pytest.mark.slow),
        ("flux", (CACHED, "lora.target_modules=attention+mlp")),
    ],
)
def test_the_training_is_equal_to_the_bit(settings, other_photos, tmp_path, family, more):
    held = f"data.held_out_dir={other_photos}"
    shared = (
        *more,
        held,
        "validation.prompts=[a b c]",
        "validation.validation_steps=3",
        "train.ema_decay=0.5",
    )
    plain = settings(*shared, family=family)
    away = settings(*shared, *OFFLOADED, f"output_dir={tmp_path}/two", family=family)
    run(plain)
    run_steps(away, 3)
    run(away)
    assert_same(plain, away)
    pictures = [
        path.relative_to(plain.output_dir) for path in (plain.output_dir / "samples").rglob("*.png")
    ]
    assert pictures
    assert all(
        (plain.output_dir / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
        for path in pictures
    )


class Watched(BlockOffload):
    """Writes down the blocks that are there, by their numbers, whenever one is due or brought."""

    def __init__(self, *arguments):
        self.seen, self.brought = [], []
        super().__init__(*arguments)

    def before_forward(self, number, *arguments):
        super().before_forward(number, *arguments)
        there = {i for i, block in enumerate(self.frozen) if all(p.numel() for p in block)}
        assert there == self.on_device.keys()
        self.seen.append((number, there))

    def onload(self, number):
        super().onload(number)
        self.brought.append(number)


def test_two_blocks_are_there_at_a_time_and_each_comes_while_the_one_before_it_computes():
    torch.manual_seed(0)
    blocks = [nn.Linear(4, 4) for _ in range(5)]
    for block in blocks:
        block.weight.requires_grad_(False)
    weights, x = [block.weight.clone() for block in blocks], torch.randn(3, 4)
    expected = x
    for block in blocks:
        expected = block(expected).tanh()
    grads = torch.autograd.grad(expected.sum(), [block.bias for block in blocks])
    rotation = Watched(blocks, torch.device("cpu"))
    for step in range(2):
        rotation.seen, rotation.brought, y = [], [], x
        for block in blocks:
            y = checkpoint(lambda given, block=block: block(given).tanh(), y, use_reentrant=False)
        assert torch.equal(y, expected)
        assert all(
            map(torch.equal, torch.autograd.grad(y.sum(), [block.bias for block in blocks]), grads)
        )
        there = [{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4}, {3, 4}, {2, 3}, {1, 2}, {0, 1}, {0, 1}]
        assert rotation.seen == list(zip([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], there, strict=True))
        assert rotation.brought == [[0, 1], []][step] + [2, 3, 4, 3, 2, 1, 0]
    assert all(
        torch.equal(kept[0], weight)
        for kept, weight in zip(rotation.cpu_copies, weights, strict=True)
    )


def test_several_processes_are_refused(settings, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process"):
        make_accelerator(settings(*OFFLOADED, family="sd3"))
