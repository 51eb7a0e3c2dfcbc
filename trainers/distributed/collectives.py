"""What processes do together: agree, share work, or let the main process work alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from math import ceil
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainers.errors import UserError

T = TypeVar("T")


TIMEOUT = timedelta(hours=1)  # for another process, which may be sampling, exporting or downloading


class ProcessGroup:
    """All processes of the run. They talk over the network alone, so that no accelerator is waited
    for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.group = (
            dist.new_group(backend="gloo", timeout=TIMEOUT)
            if accelerator.num_processes > 1
            else None
        )

    def all_max(self, *values: int) -> list[int]:
        """The largest of each among the processes."""
        if self.group is None:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """What `work` gives in the main process, None in the others. A UserError there ends all of
    them, told once."""
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


def split_between_processes(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """This process's items: each has as many, as a base that is cut needs, so some may be done
    twice."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return [items[i % len(items)] for i in range(rank, world * ceil(len(items) / world), world)]


def run_across_processes(jobs: Sequence[Callable[[], T]], accelerator: Accelerator) -> list[T]:
    """What the jobs give, in order, the work being shared among the processes."""
    world, num_each = accelerator.num_processes, ceil(len(jobs) / accelerator.num_processes)
    results = gather_object([job() for job in split_between_processes(jobs, accelerator)])
    return [results[(i % world) * num_each + i // world] for i in range(len(jobs))]
