"""The lists of a cache's shards and of its many small files, in files of bounded size, which manifest.json names with their
digests: a manifest stays small and is read in parts, however many shards there are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from teachercache.bounded.strangers_json import parse_json, values_of
from teachercache.cache.files.digests import canonical_json
from teachercache.cache.files.entries import FileInfo, FileTable, ShardTable, check_inside
from teachercache.cache.stores.named import put_named
from teachercache.cache.stores.store import Store

INDEX = "index"
FORMAT = "teachercache-index"
INDEX_SHARDS = 4096  # in one file: with two groups about 1 MB
_SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_INDEX_BYTES = 2**25  # of one file
MOST_INDEX_VALUES = 2**20  # in one file: 4096 shards of 40 groups have half of that
MOST_VALUES = 2**23  # in all of them: half a million shards of two groups

Read = Callable[[str, int], bytes]  # (file, its size) to its bytes


@dataclass(frozen=True)
class Indexed:
    """Contents of index files: shards, and files that belong to no shard, such as those of quarantined rows."""

    shards: ShardTable
    files: FileTable
    index: tuple[FileInfo, ...] = ()


def write_index(
    store: Store, shards: ShardTable, files: Sequence[FileInfo], *, within: str = INDEX
) -> list[dict[str, Any]]:
    """Write the index files of a cache; returns their entries for the manifest. Equal lists give equal files, and
    shards that are added later leave full files as they are."""
    table, entries = FileTable.of(files), []
    for number in range(-(-max(len(shards), len(table)) // INDEX_SHARDS)):
        chosen = slice(number * INDEX_SHARDS, (number + 1) * INDEX_SHARDS)
        columns: dict[str, Any] = {
            "format": FORMAT,
            "shards": shards.to_columns(chosen),
            "files": table.to_columns(chosen),
        }
        info = put_named(store, within, f"part-{number:05d}", ".json", canonical_json(columns) + b"\n")
        entries.append({**vars(info), "first": chosen.start, "shards": len(columns["shards"]["rows"])})
    return entries


def remove_others(store: Store, entries: Iterable[dict[str, Any]], *, within: str = INDEX) -> None:
    """Remove index files that a manifest, which is in place by now, does not name: those of the one before it, and what killed
    attempts left."""
    kept = {entry["file"] for entry in entries}
    store.delete(*(name for name in store.list(f"{within}/") if name not in kept))
    store.sweep(f"{within}/")


def read_index(entries: Iterable[dict[str, Any]], read: Read, *, groups: Sequence[str]) -> Indexed:
    """Reads the index files that a manifest names, for these column groups; keys and groups that it does not name are
    ignored. Raises `ValueError`, `KeyError` or `TypeError` for files that are not those that the manifest promises."""
    shards, files, infos = [], [], []
    count, left = 0, MOST_VALUES
    for entry in entries:
        info = FileInfo(entry["file"], entry["bytes"], entry["sha256"])
        text = _checked_bytes(info, read)
        data = parse_json(text, most=min(MOST_INDEX_VALUES, left))
        left -= values_of(text)
        if data["format"] != FORMAT:
            raise ValueError(f"{info.file} is no index")
        if not all(map(_SHA256.fullmatch, data["shards"]["row_ids"])):
            raise ValueError(f"a row_ids in {info.file} is no sha256")
        held = len(data["shards"]["rows"])
        if (entry["first"], entry["shards"]) != (count, held):
            raise ValueError(f"{info.file} does not list the shards that its entry says")
        shards.append(data["shards"])
        files.append(data["files"])
        infos.append(info)
        count += held
    return Indexed(ShardTable.from_columns(shards, groups), FileTable.from_columns(files), tuple(infos))


def _checked_bytes(info: FileInfo, read: Read) -> bytes:
    check_inside(info.file)
    if not (type(info.bytes) is int and 0 < info.bytes <= MOST_INDEX_BYTES):
        raise ValueError(f"{info.file} claims {info.bytes} bytes, at most {MOST_INDEX_BYTES} are possible")
    data = read(info.file, info.bytes)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise ValueError(f"{info.file} differs from its sha256 in the manifest (damaged bytes)")
    return data
