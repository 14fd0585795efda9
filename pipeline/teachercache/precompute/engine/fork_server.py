"""Processes that may die without harm to the one that asks them: how they ended is told, and what they said last.

The first one costs the imports of what it runs; the next ones are forks of a server that has imported it (forks.py) and start
in milliseconds. All end with the process that started the server, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from teachercache.precompute.engine.forks import NUMBER

LAST_BYTES = 8192  # of what a process prints that are kept
LAST_LINES = 6
MOST_CHARACTERS = 200  # of one of these lines
_STACK = "(most recent call first):"  # what faulthandler puts before the calls of a thread
GRACE = 3.0  # seconds in which a process that hangs may say where


class Ended(Exception):
    """The process is gone; `str()` says how, with its last lines."""


class Silent(Exception):
    """The process said nothing within the time."""


class ForkServer:
    """Starts processes that run `target`, a `module:function` of one connection."""

    def __init__(self, target: str) -> None:
        self._control, theirs = socket.socketpair()
        path = os.pathsep.join(place for place in sys.path if place)
        command = [sys.executable, "-P", "-m", "teachercache.precompute.engine.forks", str(theirs.fileno()), target]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path}
        )
        theirs.close()

    def fork(self) -> Fork:
        """A new process. Raises `Ended` where the server itself is gone."""
        ours, theirs = socket.socketpair()
        reads, writes = os.pipe()
        with theirs, os.fdopen(writes, "wb"):
            output = os.fdopen(reads, "rb", buffering=0)
            with contextlib.suppress(OSError):
                socket.send_fds(self._control, [NUMBER.pack(0)], [theirs.fileno(), writes])
            pid = self._answer()
        return Fork(self, pid, Connection(ours.detach()), output)

    def exit_status(self, pid: int) -> int:
        """Exit status of a process that is ended; waits for its end. Negative: the signal that ended it."""
        with contextlib.suppress(OSError):
            self._control.sendall(NUMBER.pack(pid))
        return self._answer()

    def close(self) -> None:
        """End the server and all that it started."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _answer(self) -> int:
        data = b""
        while len(data) < NUMBER.size:
            try:
                piece = self._control.recv(NUMBER.size - len(data))
            except OSError:
                piece = b""
            if not piece:
                raise Ended("the process that starts the teacher's ended; its reason is in Ray's log of this actor")
            data += piece
        number: int = NUMBER.unpack(data)[0]
        return number


class Fork:
    """One of its processes; talks in objects that pickle knows."""

    def __init__(self, server: ForkServer, pid: int, connection: Connection, output: Any) -> None:
        self.pid = pid
        self._server, self._connection, self._tail = server, connection, bytearray()
        self._listening = threading.Thread(target=self._listen, args=(output,), daemon=True)
        self._listening.start()

    def send(self, message: Any) -> None:
        """Raises `Ended`."""
        try:
            self._connection.send(message)
        except OSError:
            raise Ended(self.end()) from None

    def receive(self, seconds: float | None = None) -> Any:
        """The next message. Raises `Ended`, or `Silent` where there is none within so many seconds."""
        try:
            if not self._connection.poll(seconds):
                raise Silent
            return self._connection.recv()
        except (EOFError, OSError):
            raise Ended(self.end()) from None

    def end(self, *, asking_where: bool = False) -> str:
        """End it, if it has not ended by itself; returns how it ended, with its last lines. With `asking_where` it is
        first made to print where it is."""
        with contextlib.suppress(ProcessLookupError):
            if asking_where:
                os.kill(self.pid, signal.SIGABRT)
                self._wait_until_closed(GRACE)
            os.kill(self.pid, signal.SIGKILL)
        status = self._server.exit_status(self.pid)
        self._connection.close()
        self._listening.join(timeout=1)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return "; ".join([how, *self.last_lines()])

    def last_lines(self) -> list[str]:
        """The last lines that it printed; where a signal ended it, the calls that it was in."""
        text = self._tail.decode("utf-8", errors="replace").splitlines()
        lines = [line.strip()[:MOST_CHARACTERS] for line in text if line.strip()]
        stack = [index for index, line in enumerate(lines) if line.endswith(_STACK)]
        return lines[stack[-1] :][:LAST_LINES] if stack else lines[-LAST_LINES:]

    def _wait_until_closed(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll(max(0.0, until - time.monotonic())):
                self._connection.recv_bytes()

    def _listen(self, output: Any) -> None:
        """Keep the end of what it prints, and pass it on to where this process prints."""
        with output, contextlib.suppress(OSError, ValueError):
            while piece := output.read(65536):
                self._tail += piece
                del self._tail[:-LAST_BYTES]
                os.write(2, piece)
