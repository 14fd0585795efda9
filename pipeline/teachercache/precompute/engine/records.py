"""Records of a job in its own `.work/`: read as JSON of the shape that it wrote, or refused in one line.

A record that is no JSON at all counts as missing, and its unit is computed again. One of another shape was written by
something else, and computing over it would hide that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache.files.bounds import Count, validated
from teachercache.cache.files.entries import check_inside, file_info
from teachercache.cache.files.regular_files import open_regular, refused_in_a_line, why_different
from teachercache.cache.storage.store import LocalStore
from teachercache.errors import CacheDamaged

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


def read_shaped(file: Path, shape: TypeAdapter[Any], *, remedy: str) -> dict[str, Any] | None:
    """A JSON file of this shape; None where there is none, or no JSON.

    Raises `CacheDamaged`, which says the `remedy`, for one of another shape, or that names files outside the cache.
    """
    record: dict[str, Any] | None = read_json(file)
    if record is None:
        return None
    try:
        validated(partial(shape.validate_python, strict=True), record)  # "3" and true are no counts
        for name in _names(record):
            check_inside(name)
    except ValueError as error:
        raise CacheDamaged(f"{file} is not as a job writes it ({error}); {remedy}") from None
    return record


class Recorded(Protocol):
    """A plan whose units leave records."""

    @property
    def units(self) -> int:
        """Number of units."""

    def record_file(self, unit: int) -> Path:
        """Returns the place of a unit's record, whether or not it is there."""

    def record(self, unit: int) -> dict[str, Any] | None:
        """The record, if there is one that counts."""


def pending_units(plan: Recorded) -> list[int]:
    """Units without a record that counts; one that does not is removed."""
    without = [unit for unit in range(plan.units) if plan.record(unit) is None]
    return [unit for unit in without if not _is_done_meanwhile(plan, unit)]


def _is_done_meanwhile(plan: Recorded, unit: int) -> bool:
    """Tells whether a straggler of an earlier job has put a record since; removes one that does not count."""
    file = plan.record_file(unit)
    if not file.is_file():
        return False
    if plan.record(unit) is not None:
        return True
    file.unlink(missing_ok=True)
    return False


def put_record(file: Path, record: Mapping[str, Any]) -> bool:
    """Write the record of a unit that is done, unless there is one; True where this call wrote it. Of several writers of one
    unit the first one counts: what the others wrote has names that no record says, and goes when the job is committed."""
    data = json.dumps(record, sort_keys=True).encode()
    return LocalStore(file.parent).put_if_absent(file.name, data)


def read_json(file: Path) -> Any:
    """Reads JSON of any shape; None where there is no file, or no JSON in it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def described(folder: Path, paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Files of the cache at `folder` as a plan lists them, by name."""
    return [vars(file_info(folder, path)) for path in sorted(paths) if path.is_file()]


def check_unchanged(folder: Path, files: Iterable[Mapping[str, Any]], *, remedy: str) -> None:
    """Raise `CacheDamaged`, in a line with the `remedy`, where one of these files is missing, is no regular file or has other
    bytes than when it was described."""
    for info in files:
        place = f"{folder / info['file']}, which an unfinished job goes on from,"
        with refused_in_a_line(place, remedy=remedy), open_regular(folder, info["file"]) as stream:
            if why_different(stream, expected_bytes=info["bytes"], sha256=info["sha256"]):
                raise CacheDamaged(f"{place} has other bytes than the job wrote; {remedy}")


def check_named_by_content(folder: Path, name: str, *, remedy: str) -> None:
    """The same of a file whose name ends with the beginning of its sha256."""
    place = f"{folder / name}, which an unfinished job goes on from,"
    with refused_in_a_line(place, remedy=remedy), open_regular(folder, name) as stream:
        if not hashlib.file_digest(stream, "sha256").hexdigest().startswith(Path(name).stem.rpartition("-")[2]):
            raise CacheDamaged(f"{place} has other bytes than its name says; {remedy}")


def _names(record: Mapping[str, Any]) -> list[str]:
    """Lists the files that a record or a plan names."""
    shard, others = record.get("shard"), [record.get("quarantine"), *record.get("files", ())]
    files = [*(shard["files"].values() if shard else ()), *(other for other in others if other)]
    named_files = [name for named in record.get("read_by", {}).values() for name in named.values()]
    return [*(file["file"] for file in files), *named_files]
