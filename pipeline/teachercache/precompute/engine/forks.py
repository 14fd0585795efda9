"""The server process of fork_server.py: imports what is heavy once, then forks a process for each request.

It never computes and never touches a GPU itself, so that what it forks can.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

NUMBER = struct.Struct("<q")  # a process id, 0 to ask for a process, or an exit status
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(descriptor: int, target: str) -> None:
    """Answer requests on a socket until its other end is closed: with the id of a new process, which runs `module:function` on
    the connection that came with the request, or with the exit status of one that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks gets it too, and decides
    module, _, name = target.partition(":")
    serve = getattr(importlib.import_module(module), name)
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, NUMBER.size, 2)
        if not message:
            return
        if descriptors:
            number = _fork(serve, control, *descriptors)
        else:
            number = os.waitstatus_to_exitcode(os.waitpid(NUMBER.unpack(message)[0], 0)[1])
        control.sendall(NUMBER.pack(number))


def _fork(serve: Callable[[Any], None], control: socket.socket, connection: int, output: int) -> int:
    server = os.getpid()
    if pid := os.fork():
        os.close(connection)
        os.close(output)
        return pid
    status = 1
    try:
        control.close()
        _prepare(server, output)
        serve(Connection(connection))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _prepare(server: int, output: int) -> None:
    """Ends with the server, says where it was when a signal ends it, and leaves no core file."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
