"""Ends of a job that come from outside: SIGTERM, by which schedulers take a machine back, and the death of the Ray node that a
job started for itself. Both end it in one line, whatever it waits for.

What a unit has done so far is given up: a unit counts once its record is there, and the next run computes it from its first
batch. So nothing is waited for, and the job is gone within seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teachercache.errors import JobFailed, TeachercacheError

SIGTERM_SAID = "stopped by SIGTERM; finished units are kept: run the same command again to go on"
WATCH_SECONDS = 0.5


class Terminated(BaseException):
    """Raised in the main thread; no `Exception`, so that libraries do not take it for one of their own."""


@contextmanager
def ending_in_a_line() -> Iterator[None]:
    """While it is open, SIGTERM ends the block with `JobFailed`; a second one, while the block ends, changes nothing. Anywhere
    but in the main thread it goes as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def terminate(*_: object) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Terminated(SIGTERM_SAID)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Terminated as terminated:
        raise JobFailed(str(terminated)) from None
    except Exception as error:  # of what got SIGTERM as well, such as Ray's processes in a Slurm job
        if asked and not isinstance(error, TeachercacheError):
            raise JobFailed(SIGTERM_SAID) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept_handler() -> Iterator[None]:
    """The handler of SIGTERM is after the block what it was before: `ray.init` sets one of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def watched(is_alive: Callable[[], bool], *, said: str) -> Iterator[None]:
    """While it is open, the block ends with `JobFailed` once something is not alive any more: Ray ends a process whose node is
    gone some seconds later, without a word. Anywhere but in the main thread nothing is watched."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, dead = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if not is_alive():
                dead.set()
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    def terminate(*_: object) -> None:
        if dead.is_set() and not over.is_set():
            raise Terminated(said)

    before = signal.signal(signal.SIGUSR1, terminate)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except Terminated as terminated:
        if not dead.is_set():
            raise
        raise JobFailed(str(terminated)) from None
    except Exception as error:
        if dead.is_set() and not isinstance(error, TeachercacheError):
            raise JobFailed(said) from error
        raise
    finally:
        over.set()
        watching.join()
        signal.signal(signal.SIGUSR1, before)
