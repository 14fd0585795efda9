"""Windows: the pieces of at most `length` tokens that a document is read in.

Each begins with the prefix (`tokens.prefix`: BOS, most often) and, but for the first, with tokens of the window before it:
one, because a label needs a token of its own text before it, and `context` more. These are read and no targets. So
every token of a document that is not its prefix is predicted exactly once; where there is no prefix its first token,
before which nothing stands, is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from teachercache.corpus.encoding import Encoded
from teachercache.errors import RecipeError
from teachercache.tokens.rows import Content, Segment


@dataclass(frozen=True, eq=False)
class Window:
    """A run of tokens that will be a row, or a segment of a packed row (then `segment.start` is still 0)."""

    held_out: bool
    input_ids_S: NDArray[np.int32]
    target_mask_S: NDArray[np.bool_]
    segment: Segment


def check_room(*, length: int, prefix: int, context: int) -> None:
    """Raise `RecipeError` where windows of a long document would have no token to predict."""
    if prefix + context + 2 > length:
        raise RecipeError(
            f"sequence.length is {length}, windows begin with {prefix} tokens of sequence.prefix and {context + 1} that are "
            f"read again, which leaves none to predict; set it to {prefix + context + 2} or more"
        )


def window_bounds(tokens: int, *, length: int, prefix: int = 0, context: int = 0) -> list[tuple[int, int]]:
    """[start, stop) of each window in a document of `tokens` tokens, of which the first `prefix` stand before the others too.
    What a window predicts begins where the one before it stops; none but a whole document is shorter than two."""
    bounds = [(0, min(length, tokens))]
    while (stop := bounds[-1][1]) < tokens:
        start = max(prefix, stop - 1 - context)
        bounds.append((start, min(start + length - prefix, tokens)))
    return bounds


def cut(encoded: Encoded, *, length: int, store_text: bool, context: int = 0) -> list[Window]:
    """All windows of a document, those without targets included."""
    prefix = len(encoded.prefix)
    bounds = window_bounds(len(encoded.input_ids_S), length=length, prefix=prefix, context=context)
    spans, end = [], 0
    for first, stop in bounds:
        start, end = _char_span(encoded.char_spans_S2[first:stop], otherwise=end)
        spans.append((start, end))
    said = [place for _, start, end in encoded.contents for place in (start, end)]
    byte_of_char = byte_places(encoded.text, [*chain.from_iterable(spans), *said])
    contents = [Content(role, byte_of_char[start], byte_of_char[end]) for role, start, end in encoded.contents]
    windows, predicted = [], 0
    for (first, stop), (start, end) in zip(bounds, spans, strict=True):
        segment = Segment(
            source_id=encoded.document.source_id,
            occurrence=encoded.document.occurrence,
            byte_start=byte_of_char[start],
            byte_end=byte_of_char[end],
            start=0,
            text=encoded.text[start:end] if store_text else None,
            contents=within(contents, byte_of_char[start], byte_of_char[end]) if store_text else (),
        )
        before = encoded.prefix if first else ()
        targets_S = np.append(np.zeros(len(before), dtype=np.bool_), encoded.target_mask_S[first:stop])
        targets_S[: len(before) + max(predicted - 1 - first, 0)] = False  # their labels lie in the window before
        targets_S[-1:] = False  # its label lies in the next window, which holds this token again
        ids_S = np.append(np.array(before, np.int32), encoded.input_ids_S[first:stop])
        windows.append(Window(encoded.document.held_out, ids_S, targets_S, segment))
        predicted = stop
    return windows


def within(contents: Iterable[Content], start: int, end: int) -> tuple[Content, ...]:
    """Contents as far as they lie in [start, end), counted from `start`."""
    clipped = (Content(role, max(first, start) - start, min(last, end) - start) for role, first, last in contents)
    return tuple(content for content in clipped if content.start < content.end)


def byte_places(text: str, places: Iterable[int]) -> dict[int, int]:
    """UTF-8 byte offset of each of these characters. `text` holds no lone surrogates."""
    if text.isascii():
        return {place: place for place in places}
    offsets, before, offset = {}, 0, 0
    for place in sorted({*places}):
        offset += len(text[before:place].encode())
        offsets[place], before = offset, place
    return offsets


def byte_offsets(text: str) -> NDArray[np.int64]:
    """UTF-8 byte offset of every character and of the end; shape [len(text) + 1]. `text` holds no lone surrogates."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])


def _char_span(char_spans_S2: NDArray[np.int32], *, otherwise: int) -> tuple[int, int]:
    """Characters from the first to the last token that stands for any; an empty span at `otherwise` if none does."""
    spans = char_spans_S2[char_spans_S2[:, 1] > char_spans_S2[:, 0]]
    return (int(spans[:, 0].min()), int(spans[:, 1].max())) if len(spans) else (otherwise, otherwise)
