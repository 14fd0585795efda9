"""Seconds of a work's stages, by name: whoever measures opens `measured`, whoever works says `stage(NAME)`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SECONDS: ContextVar[defaultdict[str, float] | None] = ContextVar("seconds of stages", default=None)
_INNER: ContextVar[list[float]] = ContextVar("seconds of the stages inside the one that is open")


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds of the stages that this thread goes through while it is open."""
    seconds: defaultdict[str, float] = defaultdict(float)
    token = _SECONDS.set(seconds)
    try:
        yield seconds
    finally:
        _SECONDS.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A stage; what a stage inside it takes is that one's alone. Costs next to nothing where nobody measures."""
    seconds = _SECONDS.get()
    if seconds is None:
        yield
        return
    inner = [0.0]
    outer, token, began = _INNER.get([0.0]), _INNER.set(inner), time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - began
        _INNER.reset(token)
        seconds[name] += elapsed - inner[0]
        outer[0] += elapsed
