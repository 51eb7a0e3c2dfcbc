"""Frozen blocks that wait in the CPU's memory: each comes to the accelerator when it is due, and the next meanwhile.

The weights only ever travel one way, for nothing changes them (kohya's block swap, without the way back).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn


class Rotation:
    """Of the blocks, in the order in which they compute, two at a time have their frozen weights on the device.

    The backward pass of checkpointed blocks computes each again, from the last to the first, which brings it back.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.last = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        self.home: list[list[Tensor]] = []
        self.here: dict[int, torch.cuda.Event | None] = {}  # blocks on the device, and when they have come
        for number, block in enumerate(blocks):
            self.home.append([p.data.pin_memory() if self.stream else p.data for p in self.frozen[number]])
            self.leave(number)
            block.register_forward_pre_hook(partial(self.due, number))

    def due(self, number: int, block: nn.Module, inputs: object) -> None:
        """A block is about to compute: it must be there, and may find the next one on its way."""
        ahead = number + (1 if number == 0 or number > self.last else -1)
        self.last = number
        now = torch.cuda.current_stream(self.device) if self.stream else None
        for other in self.here.keys() - {number, ahead}:
            self.leave(other)
        if now:  # what comes next may lie where the others were, and so must wait until they have computed
            self.stream.wait_stream(now)
        for wanted in (number, ahead):
            if wanted not in self.here and 0 <= wanted < len(self.home):
                self.bring(wanted)
        if now:
            now.wait_event(self.here[number])

    def bring(self, number: int) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for parameter, waiting in zip(self.frozen[number], self.home[number], strict=True):
                parameter.data = waiting.to(self.device, non_blocking=True, copy=True)
        self.here[number] = self.stream.record_event() if self.stream else None

    def leave(self, number: int) -> None:
        self.here.pop(number, None)
        for parameter in self.frozen[number]:
            parameter.data = parameter.data.new_empty(0, device=self.device)
