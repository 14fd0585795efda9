"""Signals in a process that loads data. It imports little: a spawned process imports all that it is handed."""

from __future__ import annotations

import os
import signal
import threading


def heed_parent_alone(*_: object) -> None:
    """In a loading process: from now on SIGTERM ends it only if its parent sent it.

    A loader's worker that died of anybody else's would take its parent along before the checkpoint. It cannot just
    ignore the signal: that is also how its parent ends it, and then waits for it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
