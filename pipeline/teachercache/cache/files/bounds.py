"""Bounds for the sizes that a cache states about itself, and checks of them in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from teachercache.cache.files.entries import MOST_COUNT, FileInfo

MOST_TOKENS = 2**24  # of a vocabulary
# Of a basis, a layer file or a vocabulary map; matrices of a layer of width 8192 have 600 MB.
MOST_CALIBRATION_BYTES = 2**32
MOST_SHARD_BYTES_A_ROW = 2**31  # coded, with its text; decoded, a row's targets take at most 1 GiB
MOST_LENGTH = 2**24  # tokens of a row
MOST_PREFIX = 64  # tokens that every row begins with
MOST_BATCH_BYTES = 2**29  # decompressed; see `writer.BATCH_BYTES`, a single row may be larger

Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]


def validated(validate: Any, value: Any) -> None:
    """Run a check of pydantic's; raises `ValueError` with the first thing that is wrong, in one line."""
    try:
        validate(value)
    except ValidationError as error:
        wrong = [fault for fault in error.errors() if fault["type"] != "extra_forbidden"]  # keys of a later version
        if not wrong:
            return
        first = wrong[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg'][:200]}" if place else first["msg"][:200]) from None


def check_sizes(infos: Iterable[FileInfo]) -> None:
    """Raise `ValueError` for a file beside the shards that is larger than any."""
    for info in infos:
        if info.bytes > MOST_CALIBRATION_BYTES:
            raise ValueError(f"{info.file} has {info.bytes} bytes, at most {MOST_CALIBRATION_BYTES} are possible")


def check_files(names: Sequence[str]) -> None:
    """Raise `ValueError` for a file that is listed twice."""
    if len(set(names)) < len(names):
        raise ValueError("it lists a file twice")
