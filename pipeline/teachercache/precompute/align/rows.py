"""A row of a cache in a student's tokens, aligned with the teacher's: a pure function of the row and the two tokenizers.

The student reads the text that the teacher read, segment by segment, with special tokens of its own: what its tokenizer, or
the recipe's `sequence.prefix`, puts before a text (`tokens.prefix`) before every segment, which is never aligned and never a
target, and EOS where the teacher's segment ends in one. Of a conversation it reads what was said, as its own chat template
writes it: what is said is aligned, the markup is not, but for the token that ends a turn on both sides. It learns the tokens
that stand for what the teacher was to predict.

Shapes: S tokens of a row, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import StoredRow
from teachercache.corpus.chat import ChatRenderer
from teachercache.precompute.align.reading import NO_CONTENTS, NO_TEXT, Read, Reader
from teachercache.tokens.alignment import LARGEST_COUNT, Alignment, Region, align
from teachercache.tokens.panics import panics_refused
from teachercache.tokens.prefix import begins_with, row_prefix
from teachercache.tokens.rows import Segment, TokenRow
from teachercache.tokens.spans import SpanFinder, TokenSpans

Arrays = dict[str, NDArray[Any]]
Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]  # ids and their characters
NO_ROUND_TRIP = "the {} tokenizer does not give back the text of its tokens"


@dataclass(frozen=True, eq=False)
class Piece:
    """A segment in the student's tokens: `predicted_S` says which of them stand for what the teacher was to predict."""

    ids_S: NDArray[np.int32]
    predicted_S: NDArray[np.bool_]
    bytes_S: NDArray[np.int64]  # of the text, that each token stands for
    alignment: Alignment
    exact: bool


@dataclass(frozen=True, eq=False)
class Sides:
    """The tokens of a segment on both sides, and where their texts are the same."""

    teacher_ids: NDArray[np.int32]
    teacher: TokenSpans
    student_ids: NDArray[np.int32]
    student: TokenSpans
    regions: list[Region]


@dataclass(frozen=True, eq=False)
class AlignedRow:
    """`row` in the student's tokens, with the columns of `ChunkColumns`; where it has no chunks, `problem` says why."""

    row: TokenRow
    columns: Arrays
    problem: str | None = None
    totals: dict[str, int] = field(default_factory=dict)


class Aligner:
    """Two tokenizers, and what is known of each; built once in a process. `teacher_prefix` is what the cache's rows begin
    with, `student_prefix` the same for the student (None: what its tokenizer puts in front)."""

    def __init__(
        self,
        teacher: Any,
        student: Any,
        *,
        chats: bool = False,
        teacher_prefix: Sequence[int] = (),
        student_prefix: Sequence[int] | None = None,
    ) -> None:
        self.student, self._chats = student, chats
        self._reader = Reader(ChatRenderer(student) if chats else None)
        self._finders = {"teacher": SpanFinder.of(teacher), "student": SpanFinder.of(student)}
        self._eos = {"teacher": teacher.eos_token_id, "student": student.eos_token_id}
        begins = row_prefix(student, chats=chats) if student_prefix is None else student_prefix
        self._before = {"teacher": tuple(teacher_prefix), "student": tuple(begins)}
        pad = student.pad_token_id if student.pad_token_id is not None else student.eos_token_id
        self.pad_id = int(pad) if pad is not None else 0

    def aligned(self, rows: Sequence[StoredRow]) -> list[AlignedRow]:
        """All rows, in order, their texts tokenised in one call."""
        read = [self._reader(segment) for stored in rows for segment in stored.row.segments]
        encoded = iter(self._encoded([segment.text if isinstance(segment, Read) else "" for segment in read]))
        reads = iter(read)
        return [self._row(stored.row, [(next(reads), next(encoded)) for _ in stored.row.segments]) for stored in rows]

    @panics_refused()
    def _encoded(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        batch = self.student(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            (np.array(ids, dtype=np.int32), np.array(chars, dtype=np.int64).reshape(-1, 2))
            for ids, chars in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def _row(self, row: TokenRow, encoded: Sequence[tuple[Read | str, Tokens]]) -> AlignedRow:
        ends = [*(segment.start for segment in row.segments[1:]), row.length]
        pieces: list[Piece] = []
        problems: list[str] = []
        for segment, end, (read, tokens) in zip(row.segments, ends, encoded, strict=True):
            part = slice(segment.start, end)
            piece: Piece | str = read if isinstance(read, str) else NO_TEXT
            if isinstance(read, Read):
                piece = self._piece(segment, row.input_ids_S[part], row.target_mask_S[part], read, tokens)
            if isinstance(piece, str):
                problems.append(piece)
                piece = self._nothing(end - segment.start)
            pieces.append(piece)
        return _concatenated(row, pieces, problems)

    def _piece(
        self,
        segment: Segment,
        teacher_ids_S: NDArray[np.int32],
        mask_S: NDArray[np.bool_],
        read: Read,
        tokens: Tokens,
    ) -> Piece | str:
        """The segment in the student's tokens, or why there is none."""
        teacher = self._finders["teacher"].spans(segment.text or "", teacher_ids_S)
        if teacher is None:
            return NO_ROUND_TRIP.format("teacher's")
        ids_S, chars_S2 = tokens
        if not self._chats:  # a chat template has written what there is of these
            ends = len(teacher_ids_S) > 0 and teacher.mark_S[-1] and teacher_ids_S[-1] == self._eos["teacher"]
            ids_S, chars_S2 = self._with_specials(ids_S, chars_S2, ends=bool(ends))
        elif not len(ids_S):
            return NO_CONTENTS
        else:
            ids_S, chars_S2 = self._begun(ids_S, chars_S2)
        student = self._finders["student"].spans(read.text, ids_S, chars_S2)
        if student is None:
            return NO_ROUND_TRIP.format("student's")
        return self._aligned_piece(Sides(teacher_ids_S, teacher, ids_S, student, read.regions), mask_S)

    def _aligned_piece(self, sides: Sides, mask_S: NDArray[np.bool_]) -> Piece:
        """Special tokens end texts and turns: where one follows a region on both sides, they are one thing to learn."""
        stops_T, stops_S = (
            self._finders[name].token_bytes.special_V[ids]
            for name, ids in (("teacher", sides.teacher_ids), ("student", sides.student_ids))
        )
        stops_T[: self._begin("teacher", sides.teacher_ids)] = False
        begin = self._begin("student", sides.student_ids)
        stops_S[:begin] = False
        alignment = align(
            sides.teacher, sides.student, regions=sides.regions, teacher_stops_S=stops_T, student_stops_S=stops_S
        )
        teacher_predicted_T = np.append(False, mask_S[:-1])[: len(mask_S)]
        predicted_S = _overlaps(sides, teacher_predicted_T) | _stops(alignment, teacher_predicted_T, stops_S)
        predicted_S[: max(begin, 1)] = False  # nothing of the text stands before it
        bytes_S = np.diff(sides.student.ends_S, prepend=0)
        return Piece(sides.student_ids, predicted_S, bytes_S, alignment, sides.teacher.exact and sides.student.exact)

    def _with_specials(self, ids_S: NDArray[np.int32], chars_S2: NDArray[np.int64], *, ends: bool) -> Tokens:
        if not len(ids_S) and not self._before["student"]:
            ids_S, chars_S2 = _joint(
                [self.pad_id], ids_S, chars_S2
            )  # the tokenizer makes nothing of it: rows have tokens
        after = [self._eos["student"]] if ends and self._eos["student"] is not None else []
        return _joint(self._before["student"], ids_S, chars_S2, after)

    def _begun(self, ids_S: NDArray[np.int32], chars_S2: NDArray[np.int64]) -> Tokens:
        """A conversation, which begins with the prefix where its template wrote it: a window after the first need not."""
        before = self._before["student"]
        return (ids_S, chars_S2) if begins_with(ids_S, before) else _joint(before, ids_S, chars_S2)

    def _begin(self, side: str, ids_S: NDArray[np.int32]) -> int:
        """Tokens of the prefix that a segment begins with."""
        return len(self._before[side]) if begins_with(ids_S, self._before[side]) else 0

    def _nothing(self, teacher_tokens: int) -> Piece:
        """A segment of one token with nothing to learn: segments keep their places."""
        parts = -(-teacher_tokens // LARGEST_COUNT)
        counts_K = np.diff(np.linspace(0, teacher_tokens, parts + 1).astype(np.int64)).astype(np.uint16)
        one_K = np.array([1, *([0] * (parts - 1))], dtype=np.uint16)
        alignment = Alignment(counts_K, one_K, np.zeros(parts, dtype=np.bool_), 0)
        nothing_S = np.zeros(1, dtype=np.int64)
        return Piece(np.array([self.pad_id], dtype=np.int32), nothing_S > 0, nothing_S, alignment, exact=True)


def _joint(
    before: Sequence[int], ids_S: NDArray[np.int32], chars_S2: NDArray[np.int64], after: Sequence[int] = ()
) -> Tokens:
    """Tokens between others that stand for no text."""
    nothing = np.zeros((1, 2), dtype=np.int64)
    ids_S = np.concatenate([np.array(before, np.int32), ids_S, np.array(after, np.int32)])
    return ids_S, np.concatenate([nothing.repeat(len(before), 0), chars_S2, nothing.repeat(len(after), 0)])


def _overlaps(sides: Sides, teacher_predicted_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The student's tokens that stand for bytes which the teacher was to predict. One that reaches over the edge counts: it is
    what the student would have to write there."""
    widths_T = np.diff(sides.teacher.ends_S, prepend=0)
    covered_T = np.cumsum(widths_T * teacher_predicted_T)
    with_text = widths_T > 0
    places, covered = np.append(0, sides.teacher.ends_S[with_text]), np.append(0, covered_T[with_text])
    ends_S = sides.student.ends_S
    starts_S = np.append(0, ends_S[:-1])
    overlaps_S = np.zeros(len(ends_S), dtype=np.bool_)
    for region in sides.regions:
        edges = (np.clip(places_S, region.student_start, region.student_end) for places_S in (starts_S, ends_S))
        before, after = (
            np.interp(edge_S - region.student_start + region.teacher_start, places, covered) for edge_S in edges
        )
        overlaps_S |= after > before
    return overlaps_S


def _stops(
    alignment: Alignment, teacher_predicted_T: NDArray[np.bool_], stops_S: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The student's special tokens that are aligned with one which the teacher was to predict."""
    is_stop_S = np.zeros(len(stops_S), dtype=np.bool_)
    first_T, first_S = (
        np.cumsum(counts, dtype=np.int64) - counts
        for counts in (alignment.teacher_counts_K, alignment.student_counts_K)
    )
    single_K = alignment.aligned_K & (alignment.teacher_counts_K == 1) & (alignment.student_counts_K == 1)
    chosen_S = first_S[single_K]
    is_stop_S[chosen_S] = stops_S[chosen_S] & teacher_predicted_T[first_T[single_K]]
    return is_stop_S


def _concatenated(row: TokenRow, pieces: Sequence[Piece], problems: Sequence[str]) -> AlignedRow:
    starts = np.cumsum([0, *(len(piece.ids_S) for piece in pieces)])
    segments = tuple(
        replace(segment, start=int(start), text=None) for segment, start in zip(row.segments, starts, strict=False)
    )
    masks = [np.append(piece.predicted_S[1:], False) for piece in pieces]
    student = replace(
        row,
        input_ids_S=np.concatenate([piece.ids_S for piece in pieces]),
        target_mask_S=np.concatenate(masks),
        segments=segments,
    )
    alignments = [piece.alignment for piece in pieces]
    columns = {
        "teacher_counts": np.concatenate([alignment.teacher_counts_K for alignment in alignments]),
        "student_counts": np.concatenate([alignment.student_counts_K for alignment in alignments]),
        "aligned": np.concatenate([alignment.aligned_K for alignment in alignments]).astype(np.uint16),
    }
    token_bytes_S = np.concatenate([piece.bytes_S for piece in pieces])
    totals = {
        "rows": 1,
        "teacher_tokens": row.length,
        "student_tokens": student.length,
        "positions": student.positions,
        "chunks": sum(int(alignment.aligned_K.sum()) for alignment in alignments),
        "bytes": sum(
            segment.byte_end - segment.byte_start for segment in row.segments
        ),  # also where there are no chunks
        "aligned_bytes": sum(alignment.aligned_bytes for alignment in alignments),
        "rows_by_characters": int(not all(piece.exact for piece in pieces)),
        "segments_without_chunks": len(problems),
    }
    problem = problems[0] if len(problems) == len(pieces) else None
    return AlignedRow(student, {"token_bytes": token_bytes_S.astype(np.uint32), **columns}, problem, totals)
