"""Frozen blocks that wait in the CPU's memory.

Each comes to the accelerator when it is due, and the next one meanwhile. The weights only ever
travel one way, for nothing changes them (kohya's block swap, without the way back).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn


class BlockOffload:
    """Keeps the frozen weights of two blocks at a time on the device.

    blocks: in the order in which they compute. The backward pass of checkpointed blocks computes
    each again, from the last to the first, which brings it back.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.last_index = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        self.cpu_copies: list[list[Tensor]] = []
        # the blocks that are there, each with the event of its arrival
        self.on_device: dict[int, torch.cuda.Event | None] = {}
        for number, block in enumerate(blocks):
            weights = [p.data for p in self.frozen[number]]
            # only pinned memory is copied while the device computes
            self.cpu_copies.append([w.pin_memory() for w in weights] if self.stream else weights)
            self.offload(number)
            block.register_forward_pre_hook(partial(self.before_forward, number))

    def before_forward(self, number: int, block: nn.Module, inputs: object) -> None:
        """A block is about to compute: it must be there, and may find the next one on its way."""
        upcoming = number + (1 if number == 0 or number > self.last_index else -1)
        self.last_index = number
        current_stream = torch.cuda.current_stream(self.device) if self.stream else None
        for other in self.on_device.keys() - {number, upcoming}:
            self.offload(other)
        # what comes next may lie where the others were, and so must wait until they have computed
        if current_stream:
            self.stream.wait_stream(current_stream)
        for needed in (number, upcoming):
            if needed not in self.on_device and 0 <= needed < len(self.cpu_copies):
                self.onload(needed)
        if current_stream:
            current_stream.wait_event(self.on_device[number])

    def onload(self, number: int) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            pairs = zip(self.frozen[number], self.cpu_copies[number], strict=True)
            for parameter, cpu_copy in pairs:
                parameter.data = cpu_copy.to(self.device, non_blocking=True, copy=True)
        self.on_device[number] = self.stream.record_event() if self.stream else None

    def offload(self, number: int) -> None:
        self.on_device.pop(number, None)
        for parameter in self.frozen[number]:
            parameter.data = parameter.data.new_empty(0, device=self.device)
