"""Where the files of a cache are: a folder, or an object store that is read through local copies.

A `Source` gives paths of files whose bytes were checked against the manifest, once in a process; what reads them need not
know where they come from. Sources are picklable: loading processes check and fetch for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError
from teachercache.shards.local_copies import LocalCopies
from teachercache.shards.manifest import MANIFEST, FileInfo, Manifest, hash_file, parse_manifest, read_manifest
from teachercache.shards.object_store import ObjectStore
from teachercache.shards.prefetch import Prefetcher

TEACHER = "teacher"


class Source(Protocol):
    """Files of one cache."""

    name: str  # what messages call the cache

    def manifest(self) -> Manifest:
        """Read and check manifest.json. Raises `CacheError` when there is none, `CacheDamaged` when it was changed."""

    def path_of(self, info: FileInfo) -> Path:
        """A file whose bytes are those of the manifest, as far as they were checked in this process.

        Map it at once: a local copy may be evicted, which takes nothing from those that have it open.
        """

    def unchecked_path_of(self, info: FileInfo) -> Path:
        """The same, where what is read of the file is checked otherwise: nothing is hashed for it."""

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file that no manifest lists; None where there is none."""

    def names(self, folder: str) -> list[str]:
        """Files below a folder of the cache, as it is now."""

    def folder_of(self, name: str, infos: Sequence[FileInfo]) -> Path:
        """The folder `name` of the cache with these files, which are all in it."""

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        """Begin to fetch files that are needed soon, in the background; replaces what was asked for before.

        Errors are kept for the one who reads the file. Does nothing where nothing has to be fetched.
        """


def source_of(location: str | Path, *, local: str | Path, local_bytes: int) -> Source:
    """The source of a folder or URL; `local` and `local_bytes` serve URLs. Raises `CacheError`."""
    if is_url(location):
        return RemoteFiles(ObjectStore(str(location)), LocalCopies(local, limit=local_bytes))
    return LocalFiles(Path(location))


class LocalFiles:
    """A cache in a folder. Files are hashed at their first use in a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self._checked: set[str] = set()

    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def path_of(self, info: FileInfo) -> Path:
        if info.file not in self._checked:  # once in a process: a random order opens shards again and again
            check_bytes(self.folder, info)
            self._checked.add(info.file)
        return self.folder / info.file

    def unchecked_path_of(self, info: FileInfo) -> Path:
        return self.folder / info.file

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def names(self, folder: str) -> list[str]:
        found = (path for path in (self.folder / folder).rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def folder_of(self, name: str, infos: Sequence[FileInfo]) -> Path:
        return self.folder / name

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        """Nothing to do."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_checked": set()}


class RemoteFiles:
    """A cache in an object store, whose files are fetched when they are needed and kept in bounded local copies."""

    def __init__(self, store: ObjectStore, copies: LocalCopies) -> None:
        self.store = store
        self.copies = copies
        self.name = store.name
        self._prefetcher: Prefetcher | None = None

    def manifest(self) -> Manifest:
        return remote_manifest(self.store)

    def path_of(self, info: FileInfo) -> Path:
        return self.copies.path_of(self.store, info)

    def unchecked_path_of(self, info: FileInfo) -> Path:
        return self.path_of(info)  # a copy has to be made anyway, and copies are checked

    def read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        return sorted(name for name in self.store.sizes() if name.startswith(f"{folder}/"))

    def folder_of(self, name: str, infos: Sequence[FileInfo]) -> Path:
        return self.copies.folder_of(self.store, infos) / name

    def prefetch(self, infos: Iterable[FileInfo], *, caches: int = 1) -> None:
        if self._prefetcher is None or not self._prefetcher.belongs_here():
            self._prefetcher = Prefetcher(self.store, self.copies)
        self._prefetcher.ask_for(infos, caches=caches)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prefetcher": None}


def manifest_of(location: str | Path) -> Manifest:
    """The manifest alone, in a folder or at a URL; no local copies are made. Raises as `Source.manifest`."""
    return remote_manifest(ObjectStore(str(location))) if is_url(location) else read_manifest(Path(location))


def remote_manifest(store: ObjectStore) -> Manifest:
    """The manifest at a URL. Raises `CacheError` when there is none, `CacheDamaged` when it was changed."""
    try:
        return parse_manifest(lambda: store.read(MANIFEST), name=store.name_of(MANIFEST))
    except FileNotFoundError:
        raise CacheError(
            f"there is no cache at {store.name}: it has no {MANIFEST} (which is uploaded last); make a cache with "
            "`teachercache precompute RECIPE` and copy it there"
        ) from None


def check_bytes(folder: Path, info: FileInfo) -> None:
    """Raise `CacheDamaged`, naming file and remedy, unless a file has the size and digest that the manifest promises."""
    path = folder / info.file
    remedy = "fetch it again, or delete the cache and run `teachercache precompute` again"
    if not path.is_file():
        raise CacheDamaged(f"{path} is missing; {remedy}")
    if path.stat().st_size != info.bytes:
        raise CacheDamaged(f"{path} holds {path.stat().st_size} bytes, the manifest says {info.bytes}; {remedy}")
    if hash_file(path) != info.sha256:
        raise CacheDamaged(f"{path} differs from its sha256 in the manifest (damaged bytes); {remedy}")
