"""Alignment: finds the tokens of two tokenizers that stand for the same bytes of a text.

A *chunk* is a run of tokens on either side between two byte positions where both sides have a token end; chunks are as
short as these allow. Everything else, special tokens that stand for no text and the markup of chat templates, is in
chunks that are not aligned. Minixhofer et al., 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", compare the likelihoods of such chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.tokens.spans import TokenSpans

LARGEST_COUNT = 65535  # counts are stored in 16 bits


@dataclass(frozen=True)
class Region:
    """The same bytes in both texts. Of a plain text one, the whole; of a conversation one a message content."""

    teacher_start: int
    teacher_end: int
    student_start: int
    student_end: int


@dataclass(frozen=True, eq=False)
class Alignment:
    """Chunks in order. They hold all tokens of both sides, each once; two that are not aligned never follow each other,
    unless their counts would be too large for one."""

    teacher_counts_K: NDArray[np.uint16]  # tokens of each chunk; of an unaligned chunk either may be 0
    student_counts_K: NDArray[np.uint16]
    aligned_K: NDArray[np.bool_]  # both sides stand for the same bytes (none: both are an end of turn or of the text)
    aligned_bytes: int


def align(
    teacher: TokenSpans,
    student: TokenSpans,
    *,
    regions: Sequence[Region] | None = None,
    teacher_stops_S: NDArray[np.bool_] | None = None,
    student_stops_S: NDArray[np.bool_] | None = None,
) -> Alignment:
    """The chunks of a row; without `regions`, of one text that both sides spell whole.

    `teacher_stops_S` and `student_stops_S`, one entry a token, are True where the token ends something (EOS, an end of
    turn). Where a region ends on both sides and a stop follows at once on both, the two stops are an aligned chunk of no
    bytes: where a text ends is something to learn too.

    Tokens without width that are no marks (a lone ▁ for the dummy prefix) belong to the chunk that follows. Raises
    `ValueError` for regions that overlap, are not in order, or are not equally long on both sides.
    """
    if regions is None:
        regions = [Region(0, _size(teacher), 0, _size(student))]
    _check(regions, _size(teacher), _size(student))
    sides = _Side.of(teacher), _Side.of(student)
    places = [_common(*sides, region) for region in regions]
    joints_T = np.concatenate([np.zeros(0, dtype=np.int64), *(place[0] for place in places)])
    joints_S = np.concatenate([np.zeros(0, dtype=np.int64), *(place[1] for place in places)])
    bytes_J = np.concatenate([np.zeros(0, dtype=np.int64), *(place[2] for place in places)])
    region_J = np.repeat(np.arange(len(regions)), [len(place[0]) for place in places])
    cells = _cells(joints_T, joints_S, bytes_J, region_J, teacher, student)
    if teacher_stops_S is not None and student_stops_S is not None:
        ends_J = _region_ends(region_J, bytes_J, regions)
        cells = _with_stops(cells, ends_J, joints_T, joints_S, np.asarray(teacher_stops_S), np.asarray(student_stops_S))
    return _assembled(_without_marks(cells, teacher.mark_S, student.mark_S))


@dataclass(frozen=True, eq=False)
class _Side:
    """Places where one side may be cut: byte positions, ascending, and the number of tokens before each."""

    places_P: NDArray[np.int64]
    cuts_P: NDArray[np.int64]

    @classmethod
    def of(cls, spans: TokenSpans) -> _Side:
        candidates = np.flatnonzero(spans.usable_S & ~spans.mark_S & (spans.ends_S > 0))
        places_P = spans.ends_S[candidates]
        first_P = np.append(True, places_P[1:] != places_P[:-1])[
            : len(places_P)
        ]  # what has no width comes after the cut
        places_P, cuts_P = places_P[first_P], candidates[first_P] + 1
        if spans.start_usable:
            places_P, cuts_P = np.append(0, places_P), np.append(0, cuts_P)
        return cls(places_P, cuts_P)


def _size(spans: TokenSpans) -> int:
    """Bytes of the text."""
    return int(spans.ends_S[-1]) if len(spans.ends_S) else 0


def _check(regions: Sequence[Region], teacher_size: int, student_size: int) -> None:
    teacher_end = student_end = 0
    for region in regions:
        if region.teacher_end - region.teacher_start != region.student_end - region.student_start:
            raise ValueError(f"{region} is not equally long on both sides, so it is not the same bytes")
        in_order = teacher_end <= region.teacher_start <= region.teacher_end <= teacher_size
        if not (in_order and student_end <= region.student_start <= region.student_end <= student_size):
            raise ValueError(f"{region} is out of order, overlaps the one before it or reaches past the text")
        teacher_end, student_end = region.teacher_end, region.student_end


def _common(teacher: _Side, student: _Side, region: Region) -> tuple[NDArray[np.int64], ...]:
    """Returns the places of a region where both sides may be cut: teacher's tokens before, student's tokens before,
    bytes of the region before."""
    first, stop = np.searchsorted(teacher.places_P, [region.teacher_start, region.teacher_end + 1])
    places_P = teacher.places_P[first:stop] - region.teacher_start
    found_P = np.searchsorted(student.places_P, places_P + region.student_start)
    inside_P = found_P < len(student.places_P)
    inside_P[inside_P] = student.places_P[found_P[inside_P]] == places_P[inside_P] + region.student_start
    return teacher.cuts_P[first:stop][inside_P], student.cuts_P[found_P[inside_P]], places_P[inside_P]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Runs of tokens, in order, some empty: from which token to which on either side, and the bytes if aligned, else -1."""

    teacher_C2: NDArray[np.int64]
    student_C2: NDArray[np.int64]
    bytes_C: NDArray[np.int64]


def _cells(
    joints_T: NDArray[np.int64],
    joints_S: NDArray[np.int64],
    bytes_J: NDArray[np.int64],
    region_J: NDArray[np.int64],
    teacher: TokenSpans,
    student: TokenSpans,
) -> _Cells:
    """Between joints of one region aligned; before the first, after the last and from region to region not."""
    bytes_C = np.full(len(joints_T) + 1, -1, dtype=np.int64)
    bytes_C[1:-1] = np.where(region_J[1:] == region_J[:-1], np.diff(bytes_J), -1)[: max(len(joints_T) - 1, 0)]
    return _Cells(_pairs(joints_T, len(teacher.ends_S)), _pairs(joints_S, len(student.ends_S)), bytes_C)


def _pairs(joints: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.stack([np.append(0, joints), np.append(joints, count)], axis=1)


def _region_ends(
    region_J: NDArray[np.int64], bytes_J: NDArray[np.int64], regions: Sequence[Region]
) -> NDArray[np.int64]:
    """The joints that lie at the very end of their region."""
    sizes = np.array([region.teacher_end - region.teacher_start for region in regions], dtype=np.int64)
    is_last_J = np.append(region_J[1:] != region_J[:-1], True)[: len(region_J)]
    return np.flatnonzero(is_last_J & (bytes_J == sizes[region_J]))


def _with_stops(
    cells: _Cells,
    ends_J: NDArray[np.int64],
    joints_T: NDArray[np.int64],
    joints_S: NDArray[np.int64],
    teacher_stops_S: NDArray[np.bool_],
    student_stops_S: NDArray[np.bool_],
) -> _Cells:
    """The unaligned cell after each region's end gives up the stop it begins with, where both sides have one."""
    teacher_stops_S, student_stops_S = np.append(teacher_stops_S, False), np.append(student_stops_S, False)
    chosen = ends_J[teacher_stops_S[joints_T[ends_J]] & student_stops_S[joints_S[ends_J]]]
    after = chosen + 1  # cell i + 1 begins at joint i
    room = (np.diff(cells.teacher_C2[after]) > 0) & (
        np.diff(cells.student_C2[after]) > 0
    )  # a region may follow at once
    after = after[room[:, 0]]
    stops = [np.stack([pair[after, 0], pair[after, 0] + 1], axis=1) for pair in (cells.teacher_C2, cells.student_C2)]
    teacher_C2, student_C2 = cells.teacher_C2.copy(), cells.student_C2.copy()
    teacher_C2[after, 0] += 1
    student_C2[after, 0] += 1
    return _Cells(
        np.insert(teacher_C2, after, stops[0], axis=0),
        np.insert(student_C2, after, stops[1], axis=0),
        np.insert(cells.bytes_C, after, 0),
    )


def _without_marks(cells: _Cells, teacher_S: NDArray[np.bool_], student_S: NDArray[np.bool_]) -> _Cells:
    """Marks that an aligned cell begins with are split off; one with marks further inside is not aligned."""
    if not (teacher_S.any() or student_S.any()):
        return cells
    lead_T, marks_T = _marks(cells.teacher_C2, teacher_S)
    lead_S, marks_S = _marks(cells.student_C2, student_S)
    has_bytes_C = cells.bytes_C > 0  # a pair of stops may be marks
    split = np.flatnonzero(has_bytes_C & (lead_T + lead_S > 0))
    bytes_C = np.where(has_bytes_C & ((lead_T < marks_T) | (lead_S < marks_S)), -1, cells.bytes_C)
    sides = []
    for pairs, lead in ((cells.teacher_C2.copy(), lead_T), (cells.student_C2.copy(), lead_S)):
        before = np.stack([pairs[split, 0], pairs[split, 0] + lead[split]], axis=1)
        pairs[split, 0] += lead[split]
        sides.append(np.insert(pairs, split, before, axis=0))
    return _Cells(sides[0], sides[1], np.insert(bytes_C, split, -1))


def _marks(pairs: NDArray[np.int64], mark_S: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts the marks that each cell begins with, and those that it holds."""
    count = len(mark_S)
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mark_S)])
    others = np.append(np.where(mark_S, count, np.arange(count)), count)
    next_other = np.minimum.accumulate(others[::-1])[::-1]
    return np.minimum(next_other[pairs[:, 0]], pairs[:, 1]) - pairs[:, 0], before[pairs[:, 1]] - before[pairs[:, 0]]


def _assembled(cells: _Cells) -> Alignment:
    """Cells as chunks: empty ones left out, unaligned neighbours merged, counts within 16 bits."""
    counts_C2 = np.concatenate([np.diff(cells.teacher_C2), np.diff(cells.student_C2)], axis=1)
    bytes_C = np.where(counts_C2.max(axis=1) > LARGEST_COUNT, -1, cells.bytes_C)
    kept = counts_C2.any(axis=1)
    counts_C2, bytes_C = counts_C2[kept], bytes_C[kept]
    aligned_C = bytes_C >= 0
    begins = np.flatnonzero(aligned_C | np.append(True, aligned_C[:-1])[: len(aligned_C)])
    if len(begins):
        counts_C2, aligned_C = np.add.reduceat(counts_C2, begins, axis=0), aligned_C[begins]
    if counts_C2.max(initial=0) > LARGEST_COUNT:
        counts_C2, aligned_C = _split(counts_C2, aligned_C)
    counts_C2 = counts_C2.astype(np.uint16)
    return Alignment(counts_C2[:, 0], counts_C2[:, 1], aligned_C, int(bytes_C[bytes_C > 0].sum()))


def _split(counts_C2: NDArray[np.int64], aligned_C: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    rows, flags = [], []
    for pair, aligned in zip(counts_C2.tolist(), aligned_C.tolist(), strict=True):
        while any(pair):
            rows.append([min(count, LARGEST_COUNT) for count in pair])
            pair = [count - taken for count, taken in zip(pair, rows[-1], strict=True)]
            flags.append(aligned)
    return np.array(rows, dtype=np.int64), np.array(flags, dtype=np.bool_)
