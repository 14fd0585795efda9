"""Chunks between the tokens of two tokenizers: a slow twin, and properties over any Unicode text."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.tokens.alignment import LARGEST_COUNT, Alignment, Region, align
from teachercache.tokens.spans import SpanFinder, TokenSpans

from tokenizer_families import LINES, REAL, SMALL

Chunk = tuple[int, int, bool]
CHARACTERS = st.characters(exclude_categories=("Cs",))
ODD = ["👨‍👩‍👧‍👦", "e\u0301", "<s>", " ", "▁"]
PIECES = st.one_of(st.sampled_from(LINES), st.text(CHARACTERS, max_size=8), st.sampled_from(ODD))
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
PAIRS = [*itertools.combinations(SMALL, 2), *((name, name) for name in SMALL)]
FINDERS: dict[str, SpanFinder] = {}


def finder(name: str) -> SpanFinder:
    if name not in FINDERS:
        FINDERS[name] = SpanFinder.of({**SMALL, **REAL}[name]())
    return FINDERS[name]


def spans_of(name: str, text: str) -> tuple[Any, TokenSpans | None]:
    encoded = finder(name).tokenizer(text, return_offsets_mapping=True, padding=False, truncation=False)
    return encoded["input_ids"], finder(name).spans(text, encoded["input_ids"], encoded["offset_mapping"])


def chunks(alignment: Alignment) -> list[Chunk]:
    each = (alignment.teacher_counts_K, alignment.student_counts_K, alignment.aligned_K)
    return list(zip(*(array.tolist() for array in each), strict=True))


def naive(
    teacher: TokenSpans,
    student: TokenSpans,
    regions: list[Region],
    teacher_stops: list[bool] | None = None,
    student_stops: list[bool] | None = None,
) -> tuple[list[Chunk], int]:
    """A byte at a time."""
    found: list[Chunk] = []
    counted = 0

    def add(t: int, s: int, aligned: bool) -> None:
        if found and not aligned and not found[-1][2]:
            found[-1] = (found[-1][0] + t, found[-1][1] + s, False)
        elif t or s:
            found.append((t, s, aligned))

    def cuts(spans: TokenSpans) -> dict[int, int]:
        places = {0: 0} if spans.start_usable else {}
        for index, end in enumerate(spans.ends_S.tolist()):
            if spans.usable_S[index] and not spans.mark_S[index] and end > 0:
                places.setdefault(end, index + 1)
        return places

    at, cuts_t, cuts_s = (0, 0), cuts(teacher), cuts(student)
    for region in regions:
        previous = None
        for place in range(region.teacher_end - region.teacher_start + 1):
            here = cuts_t.get(region.teacher_start + place), cuts_s.get(region.student_start + place)
            if here[0] is None or here[1] is None:
                continue
            marks_t = teacher.mark_S[at[0] : here[0]].tolist()
            marks_s = student.mark_S[at[1] : here[1]].tolist()
            if previous is None:
                add(len(marks_t), len(marks_s), False)
            else:
                lead_t = len(list(itertools.takewhile(bool, marks_t)))
                lead_s = len(list(itertools.takewhile(bool, marks_s)))
                add(lead_t, lead_s, False)
                aligned = not any(marks_t[lead_t:]) and not any(marks_s[lead_s:])
                add(len(marks_t) - lead_t, len(marks_s) - lead_s, aligned)
                counted += place - previous if aligned else 0
            at, previous = (here[0], here[1]), place
        if previous == region.teacher_end - region.teacher_start and teacher_stops and student_stops:
            following = [
                other for other in regions if other.teacher_start >= region.teacher_end and other is not region
            ]
            limit_t = min((cuts_t.get(r.teacher_start, 10**9) for r in following[:1]), default=10**9)
            has_room = at[0] < min(len(teacher_stops), limit_t) and at[1] < len(student_stops)
            if has_room and teacher_stops[at[0]] and student_stops[at[1]]:
                add(1, 1, True)
                at = at[0] + 1, at[1] + 1
    add(len(teacher.ends_S) - at[0], len(student.ends_S) - at[1], False)
    return found, counted


def check(alignment: Alignment, teacher: TokenSpans, student: TokenSpans, text: str) -> None:
    """Every token in one chunk; chunk bytes are the text's; aligned ones have the same bytes on both sides."""
    data = text.encode()
    assert alignment.teacher_counts_K.dtype == alignment.student_counts_K.dtype == np.uint16
    ends = []
    for counts, spans in ((alignment.teacher_counts_K, teacher), (alignment.student_counts_K, student)):
        stops = np.cumsum(counts.astype(np.int64))
        assert stops[-1:].sum() == len(spans.ends_S)
        ends.append(np.append(0, spans.ends_S)[stops])
        assert b"".join(data[a:b] for a, b in itertools.pairwise([0, *ends[-1].tolist()])) == data or not len(stops)
    pieces = zip(*([data[a:b] for a, b in itertools.pairwise([0, *side.tolist()])] for side in ends), strict=True)
    same = [t == s for (t, s), aligned in zip(pieces, alignment.aligned_K, strict=True) if aligned]
    assert all(same)


@pytest.mark.parametrize("pair", PAIRS, ids=" | ".join)
@settings(max_examples=6, deadline=None)
@given(text=TEXTS)
def test_any_text_aligns_between_any_two_families(pair: tuple[str, str], text: str) -> None:
    (_, teacher), (_, student) = (spans_of(name, text) for name in pair)
    if teacher is None or student is None:
        return  # nothing of it became tokens: test_spans says when
    alignment = align(teacher, student)
    check(alignment, teacher, student, text)
    assert (chunks(alignment), alignment.aligned_bytes) == naive(teacher, student, [_whole(text)])
    if pair[0] == pair[1] and teacher.usable_S.all() and teacher.start_usable:
        marks = int(teacher.mark_S.sum())
        with_text = int((np.diff(teacher.ends_S, prepend=0) > 0).sum())
        assert alignment.aligned_K.sum() == with_text and alignment.aligned_bytes == len(text.encode()), marks


@pytest.mark.parametrize("pair", [*itertools.combinations(REAL, 2)], ids=" | ".join)
@settings(max_examples=8, deadline=None)
@given(text=TEXTS)
def test_any_text_aligns_between_real_tokenizers(pair: tuple[str, str], text: str) -> None:
    (_, teacher), (_, student) = (spans_of(name, text) for name in pair)
    if teacher is None or student is None:
        return
    alignment = align(teacher, student)
    check(alignment, teacher, student, text)
    assert (chunks(alignment), alignment.aligned_bytes) == naive(teacher, student, [_whole(text)])


def _whole(text: str) -> Region:
    return Region(0, len(text.encode()), 0, len(text.encode()))


@st.composite
def spans(draw: st.DrawFn, size: int) -> TokenSpans:
    """Any spans over `size` bytes: marks, tokens without width, ends not known."""
    count = draw(st.integers(0, 12))
    widths = [draw(st.integers(0, 3)) for _ in range(count)]
    ends = np.minimum(np.cumsum(np.array(widths, dtype=np.int64)), size)
    ends = np.append(ends, size)
    is_zero = np.diff(ends, prepend=0) == 0
    mark = np.array([draw(st.booleans()) and zero for zero in is_zero], dtype=np.bool_)
    usable = np.array([draw(st.integers(0, 4)) > 0 for _ in ends], dtype=np.bool_)
    return TokenSpans(ends, usable, mark, exact=True, start_usable=draw(st.integers(0, 9)) > 0)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_spans_equal_the_slow_twin(data: st.DataObject) -> None:
    """With regions that lie elsewhere on either side, and stops."""
    sizes = data.draw(st.integers(0, 24)), data.draw(st.integers(0, 24))
    teacher, student = data.draw(spans(sizes[0])), data.draw(spans(sizes[1]))
    regions, at_t, at_s = [], 0, 0
    for _ in range(data.draw(st.integers(0, 3))):
        start_t, start_s = data.draw(st.integers(at_t, sizes[0])), data.draw(st.integers(at_s, sizes[1]))
        length = data.draw(st.integers(0, min(sizes[0] - start_t, sizes[1] - start_s)))
        regions.append(Region(start_t, start_t + length, start_s, start_s + length))
        at_t, at_s = start_t + length + 1, start_s + length + 1  # something lies between two contents
        if at_t > sizes[0] or at_s > sizes[1]:
            break
    alignment = align(teacher, student, regions=regions)
    assert (chunks(alignment), alignment.aligned_bytes) == naive(teacher, student, regions)
    stops = [[data.draw(st.booleans()) for _ in side.ends_S] for side in (teacher, student)]
    alignment = align(
        teacher, student, regions=regions, teacher_stops_S=np.array(stops[0]), student_stops_S=np.array(stops[1])
    )
    assert alignment.teacher_counts_K.sum() == len(teacher.ends_S)
    assert alignment.student_counts_K.sum() == len(student.ends_S)
    assert (chunks(alignment), alignment.aligned_bytes) == naive(teacher, student, regions, *stops)


def made(ends: list[int], *, marks: tuple[int, ...] = (), unknown: tuple[int, ...] = ()) -> TokenSpans:
    indices = np.arange(len(ends))
    return TokenSpans(np.array(ends), ~np.isin(indices, unknown), np.isin(indices, marks), exact=True)


def test_chunks_are_the_finest_possible() -> None:
    alignment = align(made([2, 3, 5, 9]), made([1, 3, 9]))
    assert chunks(alignment) == [(2, 2, True), (2, 1, True)] and alignment.aligned_bytes == 9


def test_no_chunk_ends_where_an_end_is_not_known() -> None:
    assert chunks(align(made([2, 4, 6], unknown=(0,)), made([2, 4, 6]))) == [(2, 2, True), (1, 1, True)]


def test_marks_are_not_aligned_but_the_end_of_the_text_is() -> None:
    teacher, student = made([0, 2, 4, 4], marks=(0, 3)), made([4, 4], marks=(1,))
    assert chunks(align(teacher, student)) == [(1, 0, False), (2, 1, True), (1, 1, False)]
    stops = np.array([False, False, False, True]), np.array([False, True])
    alignment = align(teacher, student, teacher_stops_S=stops[0], student_stops_S=stops[1])
    assert chunks(alignment) == [(1, 0, False), (2, 1, True), (1, 1, True)] and alignment.aligned_bytes == 4
    alignment = align(teacher, made([4]), teacher_stops_S=stops[0], student_stops_S=np.array([False]))
    assert chunks(alignment) == [(1, 0, False), (2, 1, True), (1, 0, False)]


def test_a_token_without_width_belongs_to_the_chunk_after_it() -> None:
    """▁ alone: the dummy prefix of a text whose first character has no token with it."""
    assert chunks(align(made([0, 0, 3, 5], marks=(0,)), made([3, 5]))) == [(1, 0, False), (2, 1, True), (1, 1, True)]
    assert chunks(align(made([3, 3, 5]), made([3, 5]))) == [(1, 1, True), (2, 1, True)]


def test_contents_of_conversations_align_and_markup_does_not() -> None:
    """Another template on either side: [u]hi[e][a]yes[e] and <user>hi</user><bot>yes</bot>, one token a tag."""
    teacher, student = made([3, 5, 8, 11, 13, 14, 17]), made([6, 7, 8, 15, 20, 23, 29])
    regions = [Region(3, 5, 6, 8), Region(11, 14, 20, 23)]
    expected = [(1, 1, False), (1, 2, True), (2, 2, False), (2, 1, True), (1, 1, False)]
    assert chunks(align(teacher, student, regions=regions)) == expected
    ends = np.array([0, 0, 1, 0, 0, 0, 1], dtype=bool), np.array([0, 0, 0, 1, 0, 0, 1], dtype=bool)
    found = align(teacher, student, regions=regions, teacher_stops_S=ends[0], student_stops_S=ends[1])
    assert chunks(found) == [(1, 1, False), (1, 2, True), (1, 1, True), (1, 1, False), (2, 1, True), (1, 1, True)]
    assert found.aligned_bytes == 5


def test_a_region_whose_edge_is_inside_a_token_begins_later() -> None:
    alignment = align(made([4, 6, 8]), made([2, 4, 6, 8]), regions=[Region(2, 8, 2, 8)])
    assert chunks(alignment) == [(1, 2, False), (1, 1, True), (1, 1, True)] and alignment.aligned_bytes == 4


def test_counts_that_are_too_large_are_split_and_not_aligned() -> None:
    many = LARGEST_COUNT + 10
    teacher, student = made([1, *range(2, many + 2), many + 5]), made([1, many + 1, many + 5])
    alignment = align(teacher, student)
    assert chunks(alignment) == [(1, 1, True), (LARGEST_COUNT, 1, False), (10, 0, False), (1, 1, True)]
    assert alignment.aligned_bytes == 5


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([Region(0, 2, 0, 3)], "equally long"),
        ([Region(2, 4, 2, 4), Region(3, 5, 5, 7)], "overlaps"),
        ([Region(2, 9, 2, 9)], "past the text"),
    ],
)
def test_regions_that_make_no_sense_are_refused(regions: list[Region], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align(made([8]), made([8]), regions=regions)


def test_texts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        align(made([8]), made([9]))


def test_nothing_aligns_with_nothing() -> None:
    assert chunks(align(made([]), made([]))) == []
    assert chunks(align(made([0], marks=(0,)), made([]))) == [(1, 0, False)]
