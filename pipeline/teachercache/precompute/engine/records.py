"""Records of a job in its own `.work/`: read as JSON of the shape that it wrote, or refused in one line.

A record that is no JSON at all counts as missing, and its unit is computed again. One of another shape was written by
something else, and computing over it would hide that.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache.files.bounds import Count, validated
from teachercache.cache.files.entries import check_inside
from teachercache.cache.files.regular_files import NoRegularFile, refused_in_a_line
from teachercache.cache.stores.store import Store, place
from teachercache.errors import CacheDamaged

AT_ONCE = 16  # small objects that are read at a time
SHARDS_AT_ONCE = 4  # whole files of targets, which are held in memory
# Units whose files are read back when a job goes on, drawn anew each time: until there are so many of them, or of their bytes.
SAMPLED_UNITS = 16
SAMPLED_BYTES = 2**30
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(TypedDict):
    """A file of the cache."""

    file: str
    bytes: Count
    sha256: Sha256


class Shard(TypedDict):
    """See `ShardInfo`."""

    rows: Count
    held_out_rows: Count
    positions: Count
    held_out_positions: Count
    tokens: Count
    row_ids: str
    files: dict[str, File]


Empty = Annotated[dict[str, Any], Field(max_length=0)]


def read_shaped(store: Store, name: str, shape: TypeAdapter[Any], *, remedy: str) -> dict[str, Any] | None:
    """A JSON file of this shape; None where there is none, or no JSON.

    Raises `CacheDamaged`, which says the `remedy`, for one of another shape, or that names files outside the cache.
    """
    return _shaped(store, name, read_json(store, name), shape, remedy=remedy)


def _shaped(store: Store, name: str, found: Any, shape: TypeAdapter[Any], *, remedy: str) -> dict[str, Any] | None:
    if found is None:
        return None
    record: dict[str, Any] = found
    try:
        validated(partial(shape.validate_python, strict=True), record)  # "3" and true are no counts
        for file in _files(record):
            check_inside(file)
    except ValueError as error:
        raise CacheDamaged(f"{place(store, name)} is not as a job writes it ({error}); {remedy}") from None
    return record


@dataclass(frozen=True)
class Records:
    """Records of the units of a job, one a unit, in the folder `within` of a store."""

    store: Store
    within: str
    units: int
    shape: TypeAdapter[Any]
    counts: Callable[[str, dict[str, Any]], bool]  # by its name: whether it is of this job; raises `CacheDamaged`

    def name(self, unit: int) -> str:
        """Written once what the unit made is in place."""
        return f"{self.within}/{unit:05d}.json"

    def finished(self) -> dict[int, dict[str, Any]]:
        """Records that count, by unit: the files that they name are there in full."""
        sizes = self.store.list()
        return self._counting([unit for unit in range(self.units) if self.name(unit) in sizes], sizes)

    def pending(self) -> list[int]:
        """Units without a record that counts. One that does not is removed, so that another can take its place."""
        done = self.finished()
        without = [unit for unit in range(self.units) if unit not in done]
        sizes = self.store.list()
        wrong = [unit for unit in without if self.name(unit) in sizes]
        meanwhile = self._counting(wrong, sizes)  # put by a straggler of an earlier job
        self.store.delete(*(self.name(unit) for unit in wrong if unit not in meanwhile))
        return [unit for unit in without if unit not in meanwhile]

    def recheck(self, *, every: bool = False) -> list[str]:
        """Read back the files of finished units, of some of them unless `every`, but of all where one of these is bad. Records
        whose files are gone or have other bytes are removed, so that these units are done again; returns the files."""
        done = self.finished()
        chosen = done if every else {unit: done[unit] for unit in _some(done)}
        wrong = self._wrong_files(chosen)
        if wrong and not every:
            wrong = self._wrong_files(done)
        self.store.delete(*(self.name(unit) for unit in wrong))
        return [file for _, file in sorted(wrong.items())]

    def _wrong_files(self, records: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
        """By unit, a file that has other bytes than its record says."""
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            found = pool.map(partial(_wrong_file, self.store), records.values())
            return {unit: file for unit, file in zip(records, found, strict=True) if file is not None}

    def _counting(self, units: Sequence[int], sizes: Mapping[str, int]) -> dict[int, dict[str, Any]]:
        found = {}
        for unit, text in zip(units, texts(self.store, map(self.name, units)), strict=True):
            name, record = self.name(unit), _parsed(text)
            remedy = f"delete it and run the same command again: unit {unit} is done again"
            record = _shaped(self.store, name, record, self.shape, remedy=remedy)
            if record is not None and self.counts(name, record) and _are_there(record, sizes):
                found[unit] = record
        return found


def _are_there(record: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(file["file"]) == file["bytes"] for file in _made_files(record))


def _made_files(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Entries of the files that a unit made."""
    shard, quarantine = record["shard"], record.get("quarantine")
    return [*(shard["files"].values() if shard else ()), *([quarantine] if quarantine else ())]


def _wrong_file(store: Store, record: Mapping[str, Any]) -> str | None:
    for file in _made_files(record):
        data = _text(store, file["file"])
        if data is None or hashlib.sha256(data).hexdigest() != file["sha256"]:
            return str(file["file"])
    return None


def _some(records: Mapping[int, Mapping[str, Any]]) -> Iterator[int]:
    """A few units, in any order."""
    size = 0
    for unit in random.sample(list(records), min(SAMPLED_UNITS, len(records))):
        if size >= SAMPLED_BYTES:
            return
        size += sum(file["bytes"] for file in _made_files(records[unit]))
        yield unit


def put_record(store: Store, name: str, record: Mapping[str, Any]) -> bool:
    """Write the record of a unit that is done, unless there is one; True where this call wrote it. Of several writers of one
    unit the first one counts: what the others wrote has names that no record says, and goes when the job is committed."""
    return store.put_if_absent(name, json.dumps(record, sort_keys=True).encode())


def texts(store: Store, names: Iterable[str]) -> Iterator[bytes | None]:
    """The bytes of many small objects, in order, several at a time: a store far away answers each after a while. None for one
    that is not there, or is no regular file."""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(partial(_text, store), names)


def _text(store: Store, name: str) -> bytes | None:
    try:
        return store.get(name)
    except (FileNotFoundError, NoRegularFile):
        return None


def read_json(store: Store, name: str) -> Any:
    """Reads JSON of any shape; None where there is no file, or no JSON in it."""
    return _parsed(_text(store, name))


def _parsed(text: bytes | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_unchanged(store: Store, files: Iterable[Mapping[str, Any]], *, remedy: str) -> None:
    """Raise `CacheDamaged`, in a line with the `remedy`, where one of these files is missing, is no regular file or has other
    bytes than when it was described."""
    for info in files:
        data = _read_again(store, info["file"], remedy=remedy)
        if (len(data), hashlib.sha256(data).hexdigest()) != (info["bytes"], info["sha256"]):
            raise CacheDamaged(f"{_going_on(store, info['file'])} has other bytes than the job wrote; {remedy}")


def check_named_by_content(store: Store, name: str, *, remedy: str) -> None:
    """The same of a file whose name ends with the beginning of its sha256."""
    digest = hashlib.sha256(_read_again(store, name, remedy=remedy)).hexdigest()
    if not digest.startswith(name.rpartition(".")[0].rpartition("-")[2]):
        raise CacheDamaged(f"{_going_on(store, name)} has other bytes than its name says; {remedy}")


def _read_again(store: Store, name: str, *, remedy: str) -> bytes:
    with refused_in_a_line(_going_on(store, name), remedy=remedy):
        return store.get(name)


def _going_on(store: Store, name: str) -> str:
    return f"{place(store, name)}, which an unfinished job goes on from,"


def _files(record: Mapping[str, Any]) -> list[str]:
    """Lists the files that a record or a plan names."""
    shard, others = record.get("shard"), [record.get("quarantine"), *record.get("files", ())]
    files = [*(shard["files"].values() if shard else ()), *(other for other in others if other)]
    named_files = [name for named in record.get("read_by", {}).values() for name in named.values()]
    return [*(file["file"] for file in files), *named_files]
