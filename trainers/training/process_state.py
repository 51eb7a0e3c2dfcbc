"""What a run changes in its process, put back when it ends; and the signals that ask it to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainers.errors import Interrupted

# those that a run may bind; Windows has neither SIGUSR1 nor SIGHUP
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if name in signal.Signals.__members__
]

# torchrun and `accelerate launch` set one of them for the processes that they start
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")

WATCH_SECONDS = 0.25

STDERR = 2

# one request may arrive twice: a launcher forwards what a scheduler has sent to every process
REPEAT_SECONDS = 2.0


class StopRequest:
    """Whether a signal, or the end of the launcher, asks this process to stop.

    With `waits_for_step` the number of the signal is only noted, for the loop to see after the
    step. Elsewhere, and at a second signal, a script ends at once: an exception would be swallowed
    by some imports and abort others. What is no script gets `Interrupted`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is asked for, nothing is watched."""
        self.signal_number = 0
        self.requested_at = -math.inf
        self.waits_for_step = self.ends_process = self.is_reported = False
        self.advice: Callable[[], str] = str
        self.process = self.launcher = 0
        self.closed = threading.Event()
        self.watcher: threading.Thread | None = None

    def listen(self, ends_process: bool = False) -> None:
        """Bind the signals and watch the launcher, if there is one, until `end_watching`.

        ends_process: for scripts. Handlers belong to the main thread: elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self.reset()
        self.ends_process, self.process = ends_process, os.getpid()
        self.bind()
        if any(name in os.environ for name in LAUNCHER_VARIABLES):
            self.launcher = os.getppid()
            self.watcher = threading.Thread(
                target=self.watch, args=[threading.get_ident()], daemon=True
            )
            self.watcher.start()

    def bind(self) -> None:
        """Bind the signals, anew where a library has bound them meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if is_to_be_bound(number):
                signal.signal(number, self.handle)

    @property
    def is_listening(self) -> bool:
        return self.process == os.getpid()

    def end_watching(self) -> None:
        self.closed.set()
        if self.watcher:
            self.watcher.join()

    def handle(self, number: int, frame: object) -> None:
        if not self.is_listening:  # a forked worker is not the one to be asked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal_number:
            self.signal_number, self.requested_at = number, time.monotonic()
            if not self.waits_for_step:
                self.interrupt(number)
        elif time.monotonic() - self.requested_at > REPEAT_SECONDS:
            self.interrupt(number)

    def interrupt(self, number: int) -> None:
        """Raises: Interrupted, unless it ends the process."""
        stop = Interrupted(number, self.advice())
        if not self.ends_process:
            raise stop
        with suppress(Exception):
            sys.stdout.flush()
            if not self.is_reported and is_first_process():
                progress_line = "\n" if self.waits_for_step else ""
                # a handler may strike inside of a write to sys.stderr
                os.write(STDERR, f"{progress_line}{stop}\n".encode())
        os._exit(128 + number)

    def launcher_is_gone(self) -> bool:
        """Whether the launcher that started this process has ended before it."""
        return self.launcher > 1 and os.getppid() != self.launcher

    def watch(self, main_thread: int) -> None:
        """Ask the main thread to stop when the launcher has ended."""
        while not self.closed.wait(WATCH_SECONDS):
            if self.launcher_is_gone() and not self.signal_number:
                deliver(signal.SIGTERM, main_thread)


def ignore_signals() -> None:
    """In the last moments of an interpreter, which calls no handler any more but would be killed,
    the work that is done keeps its exit status."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_to_be_bound(number: signal.Signals) -> bool:
    """Whether a signal's handler is Python's, so that it can be put back, and not ignored by nohup.

    torchrun forwards the hangup that nohup told it to ignore, and kills whoever outlives it.
    """
    handler = signal.getsignal(number)
    if number.name == "SIGHUP" and handler == signal.SIG_IGN:
        return "TORCHELASTIC_RUN_ID" in os.environ
    return handler is not None


def deliver(number: int, main_thread: int) -> None:
    """Send a signal to the main thread, so that it also ends what that thread waits for."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(main_thread, number)


def is_first_process() -> bool:
    """Whether this process tells what all processes of the run would."""
    return os.environ.get("RANK", "0") == "0"


stop_request = StopRequest()


@contextmanager
def restored_process() -> Iterator[None]:
    """Inside, signals make a `stop_request`; afterwards signal handlers, environment variables and
    warning filters are as before.

    Handlers belong to the main thread: a run in another one leaves them alone.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = dict(os.environ)
    was_listening = stop_request.is_listening
    with warnings.catch_warnings():
        try:
            if not was_listening:
                stop_request.listen()
            yield
        finally:
            stop_request.waits_for_step = False
            if is_main_thread:
                for number, handler in handlers.items():
                    # None: it was not bound by Python, and cannot be bound again
                    if handler is not None:
                        signal.signal(number, handler)
            if not was_listening:
                stop_request.end_watching()
                stop_request.reset()
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
