"""Fetching ahead: the order of training is arithmetic, so that the next shards are known before they are read.

Threads start at the first request, in the process that makes it: forks and pickled copies begin without any. What fails
here fails again, with its error, for the one who reads the file.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable

from teachercache.cache.files.entries import FileInfo
from teachercache.cache.storage.local_copies import LocalCopies
from teachercache.cache.stores.object_store import Closed, ObjectStore
from teachercache.errors import TeachercacheError

THREADS = 2


class Prefetcher:
    """Fetches in the background until it is dropped or the process ends."""

    def __init__(self, store: ObjectStore, copies: LocalCopies) -> None:
        self._pid = os.getpid()
        # A store of its own, which can be closed without disturbing the readers.
        self._work = _Work(ObjectStore(store.url, attempts=1), copies)
        self._threads = [threading.Thread(target=self._work.run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()
        # Also at exit: a thread that came back from pyarrow into an interpreter that is gone can abort the process.
        self._finalizer = weakref.finalize(self, _stop, self._work, self._threads, self._pid)

    def belongs_here(self) -> bool:
        """False in a fork, where its threads do not exist."""
        return self._pid == os.getpid()

    def ask_for(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        """Fetch these, in this order, instead of what is still outstanding.

        Only the first ones, as many as half of the local copies' limit holds, or a part of it where several `caches` are
        read at a time: more would evict what is not read yet.
        """
        chosen: list[FileInfo] = []
        room = self._work.copies.limit // (2 * caches)
        for info in infos:
            room -= info.bytes
            if room < 0:
                break
            chosen.append(info)
        self._work.replace(chosen)


class _Work:
    """State that the threads share; it does not refer to the `Prefetcher`, so that dropping that one ends them."""

    def __init__(self, store: ObjectStore, copies: LocalCopies) -> None:
        self.store = store
        self.copies = copies
        self.outstanding: deque[FileInfo] = deque()
        self.changed = threading.Condition()
        self.ended = False

    def replace(self, infos: Iterable[FileInfo]) -> None:
        with self.changed:
            self.outstanding = deque(infos)
            self.changed.notify_all()

    def end(self) -> None:
        self.store.close()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def run(self) -> None:
        while (info := self._next()) is not None:
            with contextlib.suppress(TeachercacheError, Closed):
                self.copies.fetch(self.store, info)

    def _next(self) -> FileInfo | None:
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.outstanding)
            return None if self.ended else self.outstanding.popleft()


def _stop(work: _Work, threads: list[threading.Thread], pid: int) -> None:
    if pid != os.getpid():  # a fork has the objects, but neither their threads nor whoever holds their locks
        return
    work.end()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
