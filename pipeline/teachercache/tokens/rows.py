"""The token sequence that flows from the corpus to the teacher, into shards and out to the student.

A *position* is a token of a row whose next-token target is stored; `target_mask` marks it, and its label is the token
that follows. The last token of a segment never has a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Content(NamedTuple):
    """The content of one message of a conversation, as a span of the text that has it."""

    role: str
    start: int  # UTF-8 bytes from the beginning of the segment's text
    end: int


@dataclass(frozen=True)
class Segment:
    """One window of one document inside a row; (source_id, byte_start, byte_end, occurrence) names it in any cache."""

    source_id: str  # content hash of the whole document, 32 hex digits
    occurrence: int  # 0 for the first row with this content
    byte_start: int  # UTF-8 byte span in the document (chat: in the rendered conversation)
    byte_end: int
    start: int  # index of its first token in the row
    text: str | None = None  # the span itself, where the cache keeps text
    contents: tuple[Content, ...] = ()  # in it, of conversations: disjoint and ascending


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One sequence. Rows of the `documents` layout hold one segment, `packed` rows hold several."""

    row_id: str  # content hash of its segments, 32 hex digits
    held_out: bool
    input_ids_S: NDArray[np.int32]
    target_mask_S: NDArray[np.bool_]  # True at i: the distribution of token i + 1 is stored
    segments: tuple[Segment, ...]

    @property
    def positions(self) -> int:
        """Number of stored targets."""
        return int(self.target_mask_S.sum())

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids_S)

    @property
    def pairs(self) -> int:
        """Number of pairs of a token and one of its segment that is not after it."""
        starts = [segment.start for segment in self.segments] or [0]
        lengths = np.diff([*starts, self.length]).astype(np.int64)
        return int((lengths * (lengths + 1) // 2).sum())

    def labels_N(self) -> NDArray[np.int32]:
        """The token that follows each position, in order; shape [positions]."""
        return self.input_ids_S[np.flatnonzero(self.target_mask_S) + 1]

    def position_ids_S(self) -> NDArray[np.int64]:
        """Token positions that restart at every segment."""
        starts = np.zeros(self.length, dtype=np.int64)
        starts[[segment.start for segment in self.segments]] = [segment.start for segment in self.segments]
        return np.arange(self.length, dtype=np.int64) - np.maximum.accumulate(starts)

    def segment_S(self) -> NDArray[np.int64]:
        """Numbers each token's segment; all 0 where segments were not read."""
        starts = np.zeros(self.length, dtype=np.int64)
        starts[[segment.start for segment in self.segments[1:]]] = 1
        return np.cumsum(starts)


def is_held_out(source_id: str, fraction: float) -> bool:
    """Tells whether a document belongs to the held-out split: a pure function of its content hash.

    It is decided for whole documents, so all windows of a document and all its repetitions land on one side, in every
    cache that anybody makes of it, and a larger fraction holds out a superset of a smaller one.
    """
    return int(source_id[-16:], 16) < fraction * 2**64


def row_id(segments: Sequence[Segment], *, repeat: int = 0) -> str:
    """The content hash that names a row: blake2b-128 over (source_id, byte span, occurrence) of its segments, in order.

    `repeat` tells rows apart whose spans are equal, which takes windows of a few tokens inside a single character.
    """
    lines = [
        f"{segment.source_id}:{segment.byte_start}:{segment.byte_end}:{segment.occurrence}" for segment in segments
    ]
    if repeat:
        lines.append(f"repeat:{repeat}")
    return hashlib.blake2b("\n".join(lines).encode("ascii"), digest_size=16).hexdigest()
