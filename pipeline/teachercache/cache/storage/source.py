"""Sources: open the files of a cache, in a folder or in an object store that is read through local copies.

A `Source` opens files whose bytes were checked against the manifest, once in a process; what reads them need not know where
they come from. What is opened is what was checked: a file that takes its place later is checked anew. Sources are
picklable: loading processes check and fetch for themselves.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

from teachercache.cache.files.entries import FileInfo
from teachercache.cache.files.listing import files_below
from teachercache.cache.files.regular_files import (
    MOST_MANIFEST_BYTES,
    open_regular,
    path_of_open,
    read_regular,
    refused_in_a_line,
    why_different,
)
from teachercache.cache.manifest.manifest import FEATURES, MANIFEST, parse_manifest, read_listed, read_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.storage.local_copies import LocalCopies
from teachercache.cache.storage.prefetch import Prefetcher
from teachercache.cache.stores.object_store import AGAIN, ObjectStore
from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError

TEACHER = "teacher"
MOST_TOKENIZER_BYTES = 2**26  # of all files of a tokenizer; the largest that we know has 33 MB
REMEDY = "fetch it again, or delete the cache and run `teachercache precompute` again"


class Source(Protocol):
    """Files of one cache."""

    name: str  # what messages call the cache
    location: str  # what opens it again

    def manifest(self, *, knows: frozenset[str] = FEATURES) -> Manifest:
        """Read and check manifest.json. Raises `CacheError` when there is none, `CacheDamaged` when it was changed."""

    def name_of(self, info: FileInfo) -> str:
        """Returns the name of a file for messages."""

    def opened(self, info: FileInfo) -> AbstractContextManager[BufferedReader]:
        """A regular file whose bytes are those of the manifest, as far as they were checked in this process.

        Raises `CacheDamaged` for any other. Map it at once: a local copy may be evicted, which takes nothing from those that
        have it open.
        """

    def unchecked(self, info: FileInfo) -> AbstractContextManager[BufferedReader]:
        """The same, where what is read of the file is checked otherwise: nothing is hashed for it."""

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file that no manifest lists; None where there is none. Raises `CacheDamaged` for what is no
        regular file, or too large."""

    def read_listed(self, name: str, size: int) -> bytes:
        """The bytes of a small file that a manifest lists, so many; not hashed. Raises `CacheDamaged` where it is not there or
        has another size."""

    def names(self, folder: str) -> list[str]:
        """Files below a folder of the cache, as it is now."""

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        """Begin to fetch files that are needed soon, in the background; replaces what was asked for before.

        Errors are kept for the one who reads the file. Does nothing where nothing has to be fetched.
        """


def source_of(location: str | Path, *, local: str | Path, local_bytes: int) -> Source:
    """The source of a folder or URL; `local` and `local_bytes` serve URLs. Raises `CacheError`."""
    if is_url(location):
        return RemoteFiles(ObjectStore(str(location)), LocalCopies(local, limit=local_bytes))
    return LocalFiles(Path(location))


def read_checked(source: Source, info: FileInfo, *, most: int) -> bytes:
    """The bytes of a small file, checked. Raises `CacheDamaged`, also for a file of more than `most` bytes."""
    _check_size(source, info, most)
    with source.opened(info) as stream:
        return stream.read()


def _check_size(source: Source, info: FileInfo, most: int) -> None:
    """Before a byte is hashed, which takes minutes where somebody claims a terabyte of zeros."""
    if info.bytes > most:
        raise CacheDamaged(f"{source.name_of(info)} has {info.bytes} bytes, at most {most} are possible; {REMEDY}")


@contextlib.contextmanager
def loadable(source: Source, info: FileInfo, *, most: int) -> Iterator[Path]:
    """While it is open, a path of the file for libraries that open it themselves, which is the file that was checked.
    Errors that name the path name the file. Raises `CacheDamaged`, also for a file of more than `most` bytes."""
    _check_size(source, info, most)
    with source.opened(info) as stream:
        path = path_of_open(stream)
        try:
            yield path
        except CacheDamaged as error:
            raise CacheDamaged(str(error).replace(str(path), source.name_of(info))) from None


@contextlib.contextmanager
def private_folder(source: Source, infos: Sequence[FileInfo], *, within: str) -> Iterator[Path]:
    """While it is open, a folder of this process alone with these files, which lie in the folder `within` of the cache, under
    their own names: for libraries that take folders. Nothing else is in it, and nobody changes it any more.

    Raises `CacheDamaged`, as `read_checked` does, and for more than `MOST_TOKENIZER_BYTES` in all.
    """
    if (total := sum(info.bytes for info in infos)) > MOST_TOKENIZER_BYTES:
        raise CacheDamaged(
            f"{source.name}/{within} has {total} bytes of small files, at most {MOST_TOKENIZER_BYTES} are possible; {REMEDY}"
        )
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
        for info in infos:
            path = Path(folder) / Path(info.file).relative_to(within)
            data = read_checked(source, info, most=MOST_TOKENIZER_BYTES)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise CacheDamaged(f"{source.name_of(info)} is a file and a folder at once; {REMEDY}") from None
        yield Path(folder)


class LocalFiles:
    """A cache in a folder. Files are hashed at their first use in a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self.location = str(folder.absolute())
        self._checked: dict[str, tuple[int, ...]] = {}  # which file it was, by name

    def manifest(self, *, knows: frozenset[str] = FEATURES) -> Manifest:
        return read_manifest(self.folder, knows=knows)

    def name_of(self, info: FileInfo) -> str:
        return str(self.folder / info.file)

    @contextlib.contextmanager
    def opened(self, info: FileInfo) -> Iterator[BufferedReader]:
        with self.unchecked(info) as stream:
            identity = _identity(stream)
            if (
                self._checked.get(info.file) != identity
            ):  # once in a process: a random order opens shards again and again
                reason = why_different(stream, expected_bytes=info.bytes, sha256=info.sha256)
                if reason is not None:
                    raise CacheDamaged(f"{self.name_of(info)} {reason}; {REMEDY}")
                self._checked[info.file] = identity
            yield stream

    @contextlib.contextmanager
    def unchecked(self, info: FileInfo) -> Iterator[BufferedReader]:
        with refused_in_a_line(self.name_of(info), remedy=REMEDY):
            stream = open_regular(self.folder, info.file)
        with stream:
            yield stream

    def read(self, name: str) -> bytes | None:
        try:
            return read_regular(self.folder, name, most=MOST_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CacheDamaged(f"{self.folder / name}: {error}; {REMEDY}") from None

    def read_listed(self, name: str, size: int) -> bytes:
        return read_listed(self.folder, name, size)

    def names(self, folder: str) -> list[str]:
        try:
            return list(files_below(self.folder, folder))
        except ValueError as error:
            raise CacheDamaged(f"{self.folder / folder}: {error}; {REMEDY}") from None

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        """Nothing to do."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_checked": {}}


def _identity(stream: BufferedReader) -> tuple[int, ...]:
    """Identifies an open file and its state."""
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class RemoteFiles:
    """A cache in an object store, whose files are fetched when they are needed and kept in bounded local copies."""

    def __init__(self, store: ObjectStore, copies: LocalCopies) -> None:
        self.store = store
        self.copies = copies
        self.name = store.name
        self.location = store.url
        self._prefetcher: Prefetcher | None = None

    def manifest(self, *, knows: frozenset[str] = FEATURES) -> Manifest:
        return remote_manifest(self.store, knows=knows)

    def name_of(self, info: FileInfo) -> str:
        return self.store.name_of(info.file)

    def opened(self, info: FileInfo) -> AbstractContextManager[BufferedReader]:
        return self.copies.opened(self.store, info)

    def unchecked(self, info: FileInfo) -> AbstractContextManager[BufferedReader]:
        return self.opened(info)  # a copy has to be made anyway, and copies are checked

    def read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name, most=MOST_MANIFEST_BYTES)
        except FileNotFoundError:
            return None

    def read_listed(self, name: str, size: int) -> bytes:
        return read_listed_object(self.store, name, size)

    def names(self, folder: str) -> list[str]:
        return list(self.store.list(f"{folder}/"))

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        if self._prefetcher is None or not self._prefetcher.belongs_here():
            self._prefetcher = Prefetcher(self.store, self.copies)
        self._prefetcher.ask_for(infos, caches=caches)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prefetcher": None}


def manifest_of(location: str | Path) -> Manifest:
    """The manifest alone, in a folder or at a URL; no local copies are made. Raises as `Source.manifest`."""
    return remote_manifest(ObjectStore(str(location))) if is_url(location) else read_manifest(Path(location))


def remote_manifest(store: ObjectStore, *, knows: frozenset[str] = FEATURES) -> Manifest:
    """The manifest at a URL. Raises `CacheError` when there is none, `CacheDamaged` when it was changed."""

    try:
        read = partial(store.read, MANIFEST, most=MOST_MANIFEST_BYTES)
        name, listed = store.name_of(MANIFEST), partial(read_listed_object, store)
        return parse_manifest(read, listed, name=name, knows=knows)
    except FileNotFoundError:
        raise CacheError(
            f"there is no cache at {store.name}: it has no {MANIFEST} (which is uploaded last); make a cache with "
            "`teachercache precompute RECIPE` and copy it there"
        ) from None


def read_listed_object(store: ObjectStore, name: str, size: int) -> bytes:
    """The bytes of a small object that a manifest lists; see `Source.read_listed`."""
    try:
        return b"".join(store.pieces(name, expected_bytes=size))
    except FileNotFoundError:
        raise CacheDamaged(f"{store.name_of(name)} is missing; {AGAIN}") from None
