"""Local copies of files in object stores: bounded in bytes, verified, shared by all processes of a machine.

    FOLDER/SHA256          a whole copy, named by its content: caches share what they have in common and never clash
    FOLDER/SHA256.part     one that is being fetched, locked by the process that fetches it
    FOLDER/.lock           held for moments, while room is made

One process fetches a file, and others that want it wait for its lock. Locks are the kernel's (flock): they end with a
process however it ends, so that a killed one leaves nobody waiting, and its part is taken over or removed. Space is
reserved before the first byte is fetched: copies and parts together stay within the limit, or are a single file that is
larger. The longest unused copies go first. Who has a copy open keeps it, and its blocks on disk, until it is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from teachercache.cache.files.entries import FileInfo
from teachercache.cache.files.regular_files import NoRegularFile, open_regular, why_different
from teachercache.cache.stores.object_store import AGAIN, ObjectStore
from teachercache.errors import CacheDamaged, CacheError, JobFailed
from teachercache.files import DISK_FULL

EVICTIONS = 10  # of a copy between its check and its opening, by other processes
TRANSFERS = 2  # of an object whose bytes arrive damaged, which a bad connection can do; twice means the object is
POLL_SECONDS = 0.05
_COPY = re.compile(r"[0-9a-f]{64}(\.part)?")


class LocalCopies:
    """The folder. Picklable. Raises `CacheError` when it cannot be written to."""

    def __init__(self, folder: str | Path, *, limit: int) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._checked: dict[str, tuple[int, ...]] = {}  # which file it was, by its sha256
        with self._readable_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                pass

    def opened(self, store: ObjectStore, info: FileInfo) -> BufferedReader:
        """A copy, open, whose bytes were checked in this process, fetched if there is none.

        What is open is what was checked: another file that takes its place later, or one that was written to since, is checked
        anew, and one that is damaged is fetched again. Raises what `ObjectStore.pieces` does, `CacheDamaged` when the object is
        missing or is not what the manifest promises, and `JobFailed` when the disk is full, or when others evict the copy as
        fast as it comes.
        """
        path = self.folder / _digest(info)
        for _ in range(EVICTIONS):
            stream = self._whole(path, info)
            if stream is not None:
                _mark_used(stream)
                return stream
            self._ensure(store, info, path)
        raise JobFailed(
            f"the local copy of {info.file} was evicted {EVICTIONS} times before it could be read: too many shards are "
            "in use for stream.local_bytes; raise it"
        )

    def fetch(self, store: ObjectStore, info: FileInfo) -> None:
        """As `opened`, without looking at the bytes of a copy that is there already."""
        if not (self.folder / _digest(info)).exists():
            self.opened(store, info).close()

    def _whole(self, path: Path, info: FileInfo) -> BufferedReader | None:
        """The copy, open, where there is one as it should be; hashed unless it was in this process."""
        try:
            stream = open_regular(path.parent, path.name)
        except (FileNotFoundError, NoRegularFile):
            return None
        identity = _identity(stream.fileno())
        if self._checked.get(info.sha256) == identity:
            return stream
        if why_different(stream, expected_bytes=info.bytes, sha256=info.sha256) is None:
            self._checked[info.sha256] = identity
            return stream
        stream.close()
        return None

    def _ensure(self, store: ObjectStore, info: FileInfo, path: Path) -> None:
        with self._readable_errors(), _locked_part(path.with_name(f"{path.name}.part")) as part:
            whole = self._whole(path, info)  # now that nobody else is at it
            if whole is not None:
                whole.close()
                return
            path.unlink(missing_ok=True)
            self._download(store, info, part, path)

    def _download(self, store: ObjectStore, info: FileInfo, part: Part, path: Path) -> None:
        try:
            for _ in range(TRANSFERS):
                if self._transferred(store, info, part) == info.sha256:
                    self._checked[info.sha256] = _identity(part.descriptor)
                    part.path.replace(path)
                    return
        except FileNotFoundError:
            raise CacheDamaged(f"{store.name_of(info.file)} is missing; {AGAIN}") from None
        raise CacheDamaged(
            f"{store.name_of(info.file)} differs from its sha256 in the manifest (damaged bytes); {AGAIN}"
        )

    def _transferred(self, store: ObjectStore, info: FileInfo, part: Part) -> str:
        """Write the object's bytes into the part; returns their sha256."""
        digest = hashlib.sha256()
        with open(part.descriptor, "wb", closefd=False) as stream:
            for piece in store.pieces(info.file, expected_bytes=info.bytes):
                if not stream.tell():
                    self._reserve(part, info)
                stream.write(piece)
                digest.update(piece)
        return digest.hexdigest()

    # ----------------------------------------------------------------- room

    def _reserve(self, part: Part, info: FileInfo) -> None:
        """Give the part its full size within the limit: evict, and wait for others that are fetching just now."""
        while True:
            with self._lock():
                copies, parts = self._found(besides=part.path)
                used = sum(entry.bytes for entry in [*copies, *parts])
                while copies and used + info.bytes > self.limit:
                    used -= copies[0].bytes
                    copies.pop(0).path.unlink(missing_ok=True)
                others = any(entry.bytes for entry in parts)
                if (used + info.bytes <= self.limit or not others) and self._allocated(part, info, copies, others):
                    return
            time.sleep(POLL_SECONDS)

    def _allocated(self, part: Part, info: FileInfo, copies: list[Entry], others: bool) -> bool:
        """Take the blocks on disk now: a full disk is known before anything is fetched. False: wait for others."""
        while True:
            try:
                os.posix_fallocate(part.descriptor, 0, info.bytes)
                return True
            except OSError as error:
                if error.errno not in DISK_FULL:  # a file system that cannot reserve
                    os.ftruncate(part.descriptor, info.bytes)
                    return True
            if copies:
                copies.pop(0).path.unlink(missing_ok=True)
            elif others:
                os.ftruncate(part.descriptor, 0)
                return False
            else:
                free = shutil.disk_usage(self.folder).free
                raise JobFailed(
                    f"no room for {info.file} ({info.bytes:,} bytes) in {self.folder}: its disk is full ({free:,} bytes "
                    "are free, and no other copy is left to delete); free space there, or set stream.local to a larger disk"
                )

    def _found(self, *, besides: Path) -> tuple[list[Entry], list[Entry]]:
        """Copies, the longest unused first, and parts of others; parts that nobody fetches any more are removed."""
        copies: list[Entry] = []
        parts: list[Entry] = []
        with os.scandir(self.folder) as entries:
            for file in entries:
                if not _COPY.fullmatch(file.name) or file.name == besides.name:
                    continue
                path = Path(file.path)
                if path.suffix == ".part" and _removed_if_abandoned(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat(follow_symlinks=False)
                    (parts if path.suffix else copies).append(Entry(stat.st_atime_ns, stat.st_size, path))
        return sorted(copies), parts

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with _closing(descriptor):
            _flock(descriptor)
            yield

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL:
                raise JobFailed(
                    f"the disk of {self.folder} is full; free space there, or set stream.local to a larger disk"
                ) from None
            raise CacheError(
                f"local copies cannot be kept in {self.folder}: {error.strerror or error}; set stream.local to a folder "
                "that can be written to"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_checked": {}}


@dataclass(frozen=True, order=True)
class Entry:
    """A file in the folder."""

    used_ns: int
    bytes: int
    path: Path


@dataclass(frozen=True)
class Part:
    """A file that is being fetched, open and locked."""

    path: Path
    descriptor: int


def _digest(info: FileInfo) -> str:
    """It becomes the name of a file: a hostile manifest must not choose another."""
    if not re.fullmatch(r"[0-9a-f]{64}", info.sha256):
        raise CacheDamaged(f"the manifest's sha256 of {info.file} is none: {info.sha256!r}; fetch the cache again")
    return info.sha256


def _identity(descriptor: int) -> tuple[int, ...]:
    """Identifies an open file and its state."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _mark_used(stream: BufferedReader) -> None:
    """The time of access says when a copy was last used, also where the file system does not note reads; that of writing stays,
    which says whether its bytes may have changed."""
    now = time.time_ns()  # the kernel's own "now" stands still for milliseconds
    os.utime(stream.fileno(), ns=(now, os.fstat(stream.fileno()).st_mtime_ns))


@contextlib.contextmanager
def _locked_part(path: Path) -> Iterator[Part]:
    """Wait until nobody else fetches this file, and keep others waiting meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with _closing(descriptor):
            _flock(descriptor)
            if not _is_at(path, descriptor):  # the one before us renamed or removed it: that lock excludes nobody
                continue
            try:
                yield Part(path, descriptor)
            finally:
                if _is_at(path, descriptor):
                    path.unlink(missing_ok=True)
            return


def _removed_if_abandoned(path: Path) -> bool:
    """Remove a part whose process has ended; True also when it went by itself."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    with _closing(descriptor):
        if not _flock(descriptor, wait=False):
            return False
        if _is_at(path, descriptor):
            path.unlink(missing_ok=True)
        return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _flock(descriptor: int, *, wait: bool = True) -> bool:
    """Unlike POSIX locks, these also keep threads of one process apart."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: files are still whole, but may be fetched more than once
        return wait
    return True


_open: set[int] = set()  # descriptors of locks in this process


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    _open.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _open:  # not in a process that was forked meanwhile
            _open.discard(descriptor)
            os.close(descriptor)


def _close_inherited() -> None:
    """A fork shares its parent's locks, and would hold them when the parent is killed."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)
