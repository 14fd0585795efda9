"""JSON that somebody else wrote: read with bounded memory.

The shortest values take most: an empty list is two bytes of text and 64 of memory. So values are counted before any is
made; counting runs at several GB/s. Depth is bounded by Python's own reader, and the digits of numbers by Python.
"""

from __future__ import annotations

import json
from typing import Any

MOST_VALUES = 2**21  # of one text; 100,000 shards in a manifest of format 1 have 1.3 million
_BEFORE_VALUES = (b"{", b"[", b",")


def values_of(data: bytes) -> int:
    """Counts the values of a JSON text; an upper bound."""
    return sum(map(data.count, _BEFORE_VALUES)) + 1


def parse_json(data: bytes, *, most: int = MOST_VALUES) -> Any:
    """The value that a text of JSON holds. Raises `ValueError` for what is none, has a key twice, is nested too deeply or has
    more than `most` values, which then take no memory."""
    if (count := values_of(data)) > most:
        raise ValueError(f"it lists {count} values, at most {most} are possible")
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refused)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it has a key twice")
    return content


def _refused(constant: str) -> Any:
    """Python reads more than JSON."""
    raise ValueError(f"{constant} is no JSON")
