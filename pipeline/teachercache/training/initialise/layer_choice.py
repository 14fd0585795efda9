"""Chooses the layers of a model to keep, as people write it: "0,5,10", "every:3", "keep:10", "first:8"."""

from __future__ import annotations

from teachercache.errors import ModelError

HOW = 'write indices ("0,5,10"), "every:3", "keep:10" (evenly spaced) or "first:8"'


def chosen_layers(choice: str, *, count: int) -> list[int]:
    """Indices of a choice out of `count` layers. Raises `ModelError` when it is empty, repeated or out of range.

    `every:n` keeps 0, n, 2n …; `keep:n` keeps n layers evenly spaced, the first and the last among them; `first:n` the
    first n. Listed indices are kept in the order given.
    """
    kind, colon, number = choice.partition(":")
    if not colon:
        return _listed(choice, count)
    size = _integer(number, choice)
    if kind not in ("every", "keep", "first"):
        raise ModelError(f"layers {choice!r}: {kind!r} is no way to choose layers; {HOW}")
    if not 1 <= size <= count:
        raise ModelError(f"layers {choice!r}: the number must be from 1 to {count}, the layers of the model")
    if kind == "every":
        return list(range(0, count, size))
    return list(range(size)) if kind == "first" else _evenly(size, count)


def _listed(choice: str, count: int) -> list[int]:
    indices = [_integer(part, choice) for part in choice.split(",") if part.strip()]
    if not indices:
        raise ModelError(f"layers {choice!r} chooses none; {HOW}")
    for index in indices:
        if not 0 <= index < count:
            raise ModelError(f"layers {choice!r}: there is no layer {index}; the model has layers 0 to {count - 1}")
        if indices.count(index) > 1:
            raise ModelError(f"layers {choice!r}: layer {index} occurs more than once; each can be kept once")
    return indices


def _evenly(size: int, count: int) -> list[int]:
    if size == 1:
        return [0]
    # Rounded half up; the step is at least 1, so that no index occurs twice.
    return [(2 * index * (count - 1) + size - 1) // (2 * (size - 1)) for index in range(size)]


def _integer(text: str, choice: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ModelError(f"layers {choice!r}: {text!r} is not a whole number; {HOW}") from None
