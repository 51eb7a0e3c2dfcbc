"""What a run changes in its process, put back when it ends."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# those that a run may bind; Windows has no SIGUSR1
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if name in signal.Signals.__members__
]


@contextmanager
def restored_process() -> Iterator[None]:
    """Afterwards signal handlers, environment variables and warning filters are as before.

    Handlers belong to the main thread: a run in another one leaves them alone.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = dict(os.environ)
    with warnings.catch_warnings():
        try:
            yield
        finally:
            if is_main_thread:
                for number, handler in handlers.items():
                    # None: it was not bound by Python, and cannot be bound again
                    if handler is not None:
                        signal.signal(number, handler)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
