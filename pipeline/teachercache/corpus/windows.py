"""Windows: the pieces of at most `length` tokens that a document is read in.

Neighbouring windows share one token. It is the last label of one window and the first context of the next, so that
every token of a document but its first is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.corpus.encoding import Encoded
from teachercache.tokens.rows import Content, Segment


@dataclass(frozen=True, eq=False)
class Window:
    """A run of tokens that will be a row, or a segment of a packed row (then `segment.start` is still 0)."""

    held_out: bool
    input_ids_S: NDArray[np.int32]
    target_mask_S: NDArray[np.bool_]
    segment: Segment


def window_bounds(tokens: int, *, length: int) -> list[tuple[int, int]]:
    """[start, stop) of each window of `tokens` tokens; none is shorter than two unless the document is."""
    return [(start, min(start + length, tokens)) for start in range(0, max(tokens - 1, 1), length - 1)]


def cut(encoded: Encoded, *, length: int, store_text: bool) -> list[Window]:
    """All windows of a document, those without targets included."""
    byte_of_char = byte_offsets(encoded.text)
    contents = [
        Content(role, int(byte_of_char[start]), int(byte_of_char[end])) for role, start, end in encoded.contents
    ]
    windows, end = [], 0
    for first, stop in window_bounds(len(encoded.input_ids_S), length=length):
        start, end = _char_span(encoded.char_spans_S2[first:stop], otherwise=end)
        segment = Segment(
            source_id=encoded.document.source_id,
            occurrence=encoded.document.occurrence,
            byte_start=int(byte_of_char[start]),
            byte_end=int(byte_of_char[end]),
            start=0,
            text=encoded.text[start:end] if store_text else None,
            contents=within(contents, int(byte_of_char[start]), int(byte_of_char[end])) if store_text else (),
        )
        targets_S = encoded.target_mask_S[first:stop].copy()
        targets_S[-1:] = False  # its label lies in the next window, which holds this token again
        windows.append(Window(encoded.document.held_out, encoded.input_ids_S[first:stop], targets_S, segment))
    return windows


def within(contents: Iterable[Content], start: int, end: int) -> tuple[Content, ...]:
    """Contents as far as they lie in [start, end), counted from `start`."""
    clipped = (Content(role, max(first, start) - start, min(last, end) - start) for role, first, last in contents)
    return tuple(content for content in clipped if content.start < content.end)


def byte_offsets(text: str) -> NDArray[np.int64]:
    """UTF-8 byte offset of every character and of the end; shape [len(text) + 1]. `text` holds no lone surrogates."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])


def _char_span(char_spans_S2: NDArray[np.int64], *, otherwise: int) -> tuple[int, int]:
    """Characters from the first to the last token that stands for any; an empty span at `otherwise` if none does."""
    spans = char_spans_S2[char_spans_S2[:, 1] > char_spans_S2[:, 0]]
    return (int(spans[:, 0].min()), int(spans[:, 1].max())) if len(spans) else (otherwise, otherwise)
