"""Scripts in processes of their own, each forked from a server that has imported the libraries
already."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import torch

from trainers.training.process_state import STOP_SIGNALS, stop_request

ROOT = Path(__file__).parents[2]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["pytest", "trainers.run", "sklearn.linear_model", "torchmetrics", "tests.shared.processes"]
)


def start(script, *arguments, log, before=None, **environment):
    """A process that runs scripts/`script`, what it prints going to the file `log`; first it calls
    `before`."""
    process = server.Process(
        target=become, args=(script, [str(a) for a in arguments], log, before, environment)
    )
    process.start()
    return process


def group(script, *arguments, log, processes, before=None, **environment):
    """As many processes as one group, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [
        start(
            script,
            *arguments,
            log=f"{log}.{rank}",
            before=before,
            **(common | {"RANK": rank, "LOCAL_RANK": rank} | environment),
        )
        for rank in range(processes)
    ]


def launch(script, *arguments, log, processes, before=None, limit=240, **environment):
    """The exit statuses of a group, -9 for those that hang, which is told after `limit` seconds."""
    ranks = group(script, *arguments, log=log, processes=processes, before=before, **environment)
    for rank in ranks:
        rank.join(limit)
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def become(script, arguments, log, before, environment):
    os.chdir(ROOT)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    # as in conftest.py: sums in another order are no longer equal to the bit
    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


def call(script, *arguments):
    """Run scripts/`script` in this process; its exit status."""
    before, sys.argv = sys.argv, [script, *(str(a) for a in arguments)]
    # a script keeps the signals to its end
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # else the next signal in this process would end it, as a script's does
        stop_request.end_watching()
        stop_request.reset()
    raise AssertionError(f"{script} did not end by sys.exit")
