"""Run a training script as it is, and write when it had loaded and when each step ended.

Peak memory is written too.

python clock.py SCRIPT [ARGUMENT ...]   with the file to write in BENCHMARK_CLOCK
"""

import atexit
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook


class Clock:
    """Seconds since the epoch, and the process's CPU seconds.

    On a GPU the steps' ends are read from its own events, so that nothing waits for it.
    """

    def __init__(self) -> None:
        self.ready = 0.0
        self.steps, self.cpu, self.events = [], [], []
        prepare = Accelerator.prepare

        def prepared(*args, **kwargs):
            result = prepare(*args, **kwargs)
            self.ready = time.time()
            return result

        Accelerator.prepare = prepared
        register_optimizer_step_post_hook(self.step)

    def step(self, *_: object) -> None:
        self.cpu.append(time.process_time())
        if not torch.cuda.is_available():
            self.steps.append(time.time())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        if len(self.events) == 1:
            torch.cuda.synchronize()
            self.steps.append(time.time())

    def write(self) -> None:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {"ready": self.ready, "peak_rss": peak, "steps": self.steps, "cpu": self.cpu}
        if self.events:
            torch.cuda.synchronize()
            start, *others = self.events
            for event in others:
                self.steps.append(self.steps[0] + start.elapsed_time(event) / 1000)
            record["peak_allocated"] = torch.cuda.max_memory_allocated()
            record["peak_reserved"] = torch.cuda.max_memory_reserved()
        Path(os.environ["BENCHMARK_CLOCK"]).write_text(json.dumps(record))


if __name__ == "__main__":
    clock = Clock()
    atexit.register(clock.write)
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
