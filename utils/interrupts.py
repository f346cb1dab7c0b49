"""Ctrl-C is heard at once, even while PyTorch is within an operation that takes minutes."""
import atexit
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from utils.errors import INTERRUPTED

T = TypeVar("T")
INTERVAL = 0.1  # seconds


def interruptible(work: Callable[[], T], meanwhile: Callable[[], object] = lambda: None) -> T:
    """Return work(), computed by a thread of its own, while this one calls `meanwhile` ten times a second.

    Python hears signals in its main thread alone, and only between two operations.  Raises what `work` raises, and
    KeyboardInterrupt at once; what the thread is doing then ends with the process.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # all are for the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not wait([outcome], timeout=INTERVAL).done:
            meanwhile()
    except KeyboardInterrupt:
        atexit.register(_leave)  # Python's own end would crash in the thread's operation
        raise
    meanwhile()
    return outcome.result()


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(INTERRUPTED)
