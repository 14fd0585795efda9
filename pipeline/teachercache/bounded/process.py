"""Asking a child process that may not take more time and memory than is said."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from typing import IO, Any

from teachercache.errors import JobFailed

HEAD = struct.Struct("<Q")  # bytes that follow
WAITS = 10  # times the processor time that a child may take, on a busy machine, before it is given up
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "PYTHONDONTWRITEBYTECODE",
)  # credentials are not for strangers
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from teachercache.bounded.child import main
main(sys.argv[2])
"""
# What the kernel, or a library in C or Rust, ends a child with that takes too much.
_WHY = {signal.SIGPROF: "time", signal.SIGSEGV: "stack", signal.SIGABRT: "memory", signal.SIGKILL: "memory"}


class Exhausted(Exception):
    """The child was ended: `str()` says of what it took too much, "time", "memory", "stack" or "text"."""


class BoundedProcess:
    """A child that answers requests of one kind, `task` (a module of this package), one at a time. It starts with the first
    request, ends with this object or this process, and is followed by another one where it had to be ended."""

    def __init__(self, task: str) -> None:
        self._task, self._lock = task, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Any, *, seconds: float, memory: int, most: int) -> Any:
        """The child's answer to a request (anything that pickle knows; the answer is JSON of at most `most` bytes), made within
        so many seconds of processor time and bytes of memory above those that the child had before the first request.

        Raises `Exhausted` where there is none within these, `JobFailed` where the child ended for another reason.
        """
        data = pickle.dumps({"request": request, "seconds": seconds, "memory": memory})
        with self._lock:
            process = self._process or self._start()
            try:
                return json.loads(_exchanged(process, data, seconds=seconds, most=most))
            except BaseException:  # also of Ctrl-C: an answer that nobody took must not be the next one's
                self._process = None
                raise
            finally:
                if self._process is None:
                    self._finalizer()  # ends it, and forgets it

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "utf8", "-P", "-c", _CHILD, json.dumps(sys.path), self._task]
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=kept
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # this end alone
        self._finalizer = weakref.finalize(self, _end_own, self._process, os.getpid())
        return self._process


def _exchanged(process: subprocess.Popen[bytes], data: bytes, *, seconds: float, most: int) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    until = time.monotonic() + WAITS * seconds
    try:
        _write(process.stdin, HEAD.pack(len(data)) + data, until)
        (size,) = HEAD.unpack(_read(process.stdout, HEAD.size, until))
        if size > most:
            raise Exhausted("text")
        return _read(process.stdout, size, until)
    except (BrokenPipeError, EOFError):
        raise Exhausted(_why_ended(process, until)) from None


def _write(stream: IO[bytes], data: bytes, until: float) -> None:
    """Writes to a pipe that may be full: a child that reads nothing, stopped or endlessly busy, holds nobody up for longer."""
    left, poll = memoryview(data), select.poll()
    poll.register(stream, select.POLLOUT)
    while left:
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Exhausted("time")
        with contextlib.suppress(BlockingIOError):
            left = left[os.write(stream.fileno(), left) :]


def _read(stream: IO[bytes], size: int, until: float) -> bytes:
    """So many bytes of a pipe."""
    pieces, poll = [], select.poll()
    poll.register(stream, select.POLLIN)
    while size:
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Exhausted("time")
        piece = os.read(stream.fileno(), min(size, 2**20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _why_ended(process: subprocess.Popen[bytes], until: float) -> str:
    try:
        status = process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "time"
    if status < 0 and signal.Signals(-status) in _WHY:
        return _WHY[signal.Signals(-status)]
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    raise JobFailed(
        f"the process that runs a stranger's template or tokenizer ended with {how}; run the same command again"
    )


def _end_own(process: subprocess.Popen[bytes], pid: int) -> None:
    if os.getpid() == pid:  # a fork has the object, but the child is its parent's
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    with contextlib.suppress(OSError, ValueError):
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()
