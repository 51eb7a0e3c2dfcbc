"""What processes do together: agree, share work, or let the main process work alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainers.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)  # for another process, which may be sampling, exporting or downloading


class ProcessGroup:
    """All processes of the run, as they agree with each other.

    They talk over the network alone, so that no accelerator is waited for.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.group = None
        if accelerator.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def all_max(self, *values: int) -> list[int]:
        """The largest of each among the processes."""
        if self.group is None:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def from_main(self, value: T) -> T:
        """What the main process has, in every process."""
        if self.group is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Call `work` in the main process and return its result; None in the other processes.

    A UserError there ends all of them, and is printed once.
    """
    result, status = None, [0]
    try:
        if accelerator.is_main_process:
            result = work()
    except UserError as error:
        status = [error.status]
        raise
    finally:
        broadcast_object_list(status)
    if status[0]:
        raise SystemExit(status[0])
    return result


def own_items(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """This process's items. Each process has as many, as a sharded base needs: some come twice."""
    if not items:
        return []
    with accelerator.split_between_processes(list(items), apply_padding=True) as own:
        return list(own)


def run_across_processes(jobs: Sequence[Callable[[], T]], accelerator: Accelerator) -> list[T]:
    """The results of the jobs, in order; the work is shared among the processes."""
    own = own_items(list(enumerate(jobs)), accelerator)
    results = dict(gather_object([(number, job()) for number, job in own]))
    return [results[number] for number in range(len(jobs))]
