"""A part in the folder of a composed cache: whole shards are linked, or copied; of a cut one the rows are written anew.

Links are hard ones: both names are the file, which nobody ever changes, and either cache may be deleted. Linked files are not
read; those of another file system or of an object store are copied, and checked on the way.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from teachercache.cache.composition.column_sizes import column_sizes
from teachercache.cache.composition.selection import Part
from teachercache.cache.files.digests import NAME_DIGITS
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.reader import Cache
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.storage.source import LocalFiles, Source
from teachercache.cache.stores.local import LocalStore
from teachercache.errors import CacheError

COPY_BYTES = 2**22


@dataclass(frozen=True)
class Placed:
    """A shard that is in place, with the bytes of its columns; `how` is linked, copied or written."""

    shard: ShardInfo
    column_bytes: dict[str, int]
    how: str

    def to_json(self) -> dict[str, Any]:
        """As a record of an unfinished job holds it."""
        return {"shard": self.shard.to_json(), "column_bytes": self.column_bytes, "how": self.how}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placed:
        """Inverse of `to_json`."""
        return cls(ShardInfo.from_json(data["shard"]), dict(data["column_bytes"]), str(data["how"]))


def place(parents: Sequence[Cache], part: Part, folder: Path, number: int) -> Placed:
    """Put a part into the cache at `folder` as its shard `number`. What is there by then is left as it is."""
    cache = parents[part.parent]
    return _written(cache, part, folder, number) if part.rows is not None else _whole(cache, part, folder, number)


def place_file(source: Source, info: FileInfo, folder: Path, name: str) -> bool:
    """Put a file of a parent into a folder under this name; True where it is linked, and not copied. Raises `CacheDamaged`
    where it is not there as its manifest says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, LocalFiles):
        with source.unchecked(info) as stream:  # a regular file, not one behind a link
            if os.fstat(stream.fileno()).st_size == info.bytes and _linked(source.folder / info.file, path):
                return True
    if not (path.is_file() and path.stat().st_size == info.bytes):
        _copied(source, info, path)
    return False


def _linked(source: Path, path: Path) -> bool:
    """Makes a hard link, unless there is one; False where the file system, or the pair of them, has none."""
    try:
        os.link(source, path, follow_symlinks=False)
    except FileExistsError:
        return os.path.samestat(path.lstat(), source.lstat())
    except OSError:
        return False
    return True


def _copied(source: Source, info: FileInfo, path: Path) -> None:
    """Copies a file whose bytes are checked; it appears whole, and has reached the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with source.opened(info) as stream, temporary.open("xb") as sink:
            shutil.copyfileobj(stream, sink, COPY_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def named(within: str, number: int, info: FileInfo) -> str:
    """Name of a file in a composed cache: its folder, number and content."""
    return f"{within}/part-{number:05d}-{info.sha256[:NAME_DIGITS]}{PurePosixPath(info.file).suffix}"


def _whole(cache: Cache, part: Part, folder: Path, number: int) -> Placed:
    shard = cache.infos[part.shard]
    names = {group: named(group, number, info) for group, info in shard.files.items()}
    linked = [place_file(cache.source, info, folder, names[group]) for group, info in shard.files.items()]
    files = {group: FileInfo(names[group], info.bytes, info.sha256) for group, info in shard.files.items()}
    sizes: dict[str, int] = {}
    for name in names.values():
        for column, size in column_sizes(folder / name, name=name).items():
            sizes[column] = sizes.get(column, 0) + size
    placed = ShardInfo(**{**vars(shard), "files": files})
    return Placed(placed, sizes, "linked" if all(linked) else "copied")


def _written(cache: Cache, part: Part, folder: Path, number: int) -> Placed:
    assert part.rows is not None
    unknown = set(cache.manifest.groups) - {group.folder for group in cache.groups}
    if unknown or any(group.among_others for group in cache.groups):
        raise CacheError(
            f"{cache.name} stores targets that only later versions of teachercache know, so its shards cannot be cut; install "
            "a newer version"
        )
    shard = cache.shard(part.shard)
    stored = [shard.read_row(int(index), None, cache.recent) for index in np.flatnonzero(part.rows)]
    info, sizes = write_shard(
        LocalStore(folder),
        number,
        rows=[item.row for item in stored],
        payload=[item.targets for item in stored],
        groups=cache.groups,
    )
    return Placed(info, sizes, "written")
