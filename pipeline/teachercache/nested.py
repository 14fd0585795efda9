"""Differences of nested settings, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Absent:
    """Stands for a key that is not there, which is something other than a key whose value is None."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


@dataclass(frozen=True)
class Difference:
    """A key, such as `targets.logits.k`, and its two values."""

    key: str
    left: Any
    right: Any


def differences(left: Any, right: Any, key: str = "") -> Iterator[Difference]:
    """The keys in which two nested mappings differ, in order; `1`, `1.0` and `true` are three values. Lists of equal length are
    compared item by item."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in sorted(left.keys() | right.keys(), key=str):
            yield from differences(left.get(name, ABSENT), right.get(name, ABSENT), _below(key, name))
    elif _is_list(left) and _is_list(right) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, _below(key, number))
    elif type(left) is not type(right) or left != right:
        yield Difference(key, left, right)


def shortened(value: Any, most: int = 80) -> str:
    """A value for a message: of so many characters at most."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
