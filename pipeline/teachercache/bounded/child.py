"""The child process: answers one request after the other, each under limits that the kernel holds.

A request's processor time is bounded by a timer whose signal ends the process, also in the middle of C code; its memory by
the size of the address space, which Python's allocations meet as a `MemoryError`. Files cannot be written to.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from teachercache.bounded.process import HEAD


def main(task: str) -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    answer = importlib.import_module(f"teachercache.bounded.{task}").answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks gets it too, and decides
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    before, (_, hardest) = _address_space(), resource.getrlimit(resource.RLIMIT_AS)
    while len(head := source.read(HEAD.size)) == HEAD.size:
        asked = pickle.loads(source.read(HEAD.unpack(head)[0]))
        most = hardest if before is None else before + asked["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most if hardest < 0 else min(most, hardest), hardest))
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        data = _answered(answer, asked.pop("request"))
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hardest, hardest))
        with contextlib.suppress(BrokenPipeError):
            sink.write(HEAD.pack(len(data)) + data)
            sink.flush()


def _answered(answer: Any, request: Any) -> bytes:
    try:
        return json.dumps(answer(request)).encode()
    except MemoryError:
        return b'{"exhausted": "memory"}'
    except RecursionError:
        return b'{"exhausted": "stack"}'


def _address_space() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()
