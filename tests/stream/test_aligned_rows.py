"""Rows aligned with a student's tokens, against a loop over chunks that is obviously right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.stream.aligned_rows import AlignedPair, aligned_tokens
from teachercache.stream.aligned_tensors import AlignedRows
from teachercache.stream.alignment import alignment_for
from teachercache.stream.collate import Collator
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS

from builders import aligned, other_student, sentences, tiny_cache

LAYERS = {"hidden": {"layers": [1, 2], "codec": "bf16"}, "attention": {"layers": [2]}}
COLUMNS = ("head_ids", "head_logits", "tail_log_partition", "actual_log_prob", BOUNDARY_MASS)


@pytest.fixture(scope="module", params=["documents", "packed"])
def aligned_cache(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, CacheAlignment]:
    folder = tmp_path_factory.mktemp(request.param)
    targets = {"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}, **LAYERS}
    texts = [*sentences(30), "naïve café 日本語 🙂👩‍👧", "ﷺ x"]
    path = tiny_cache(folder, texts=texts, targets=targets, sequence={"length": 40, "layout": request.param})
    student = other_student(folder / "student")
    aligned(path, student)
    cache = Cache.open(path)
    from teachercache.models.loading import load_tokenizer

    alignment = alignment_for(cache, load_tokenizer(str(student)), student="student")
    assert alignment is not None
    return cache, alignment


def rows_of(aligned_cache: tuple[Cache, CacheAlignment], count: int, columns: tuple[str, ...]) -> list[AlignedPair]:
    cache, alignment = aligned_cache
    rows = []
    for index in range(count):
        stored = cache.read_row("train", index, columns=columns)
        found = alignment.aligned_row("train", index, stored)
        rows.append(AlignedPair(found.row, stored, found.targets))
    return rows


def naive_chunks(row: AlignedPair) -> list[tuple[list[int], list[int]]]:
    """(teacher's tokens, student's tokens) of each aligned chunk, by index."""
    chunks, t, s = [], 0, 0
    columns = (row.alignment[name].tolist() for name in ("teacher_counts", "student_counts", "aligned"))
    for theirs, ours, is_aligned in zip(*columns, strict=True):
        if is_aligned:
            chunks.append((list(range(t, t + theirs)), list(range(s, s + ours))))
        t, s = t + theirs, s + ours
    return chunks


def test_chunks_of_a_batch_are_those_that_both_sides_predict(aligned_cache: tuple[Cache, CacheAlignment]) -> None:
    cache, alignment = aligned_cache
    rows = rows_of(aligned_cache, 8, COLUMNS)
    batch = Collator.of(AlignedRows(cache, alignment, COLUMNS))(rows)
    targets = batch["targets"]
    number = before = 0
    for row in rows:
        teacher, student = row.teacher.row, row.row
        decoded = cache.kind.decoded({name: row.teacher.targets[name] for name in COLUMNS[:-1]})
        mass = cache.targets.decoded(row.teacher.targets)[BOUNDARY_MASS]
        place_T, place_S = (np.cumsum(each.target_mask_S) - 1 for each in (teacher, student))
        for theirs, ours in naive_chunks(row):
            if not (theirs and ours and theirs[0] and ours[0]):
                continue
            if not (
                all(teacher.target_mask_S[t - 1] for t in theirs) and all(student.target_mask_S[s - 1] for s in ours)
            ):
                continue
            assert targets["chunk_first"][number] == before + place_S[ours[0] - 1]
            likely = sum(float(decoded["actual_log_prob"][place_T[t - 1]]) for t in theirs)
            assert float(targets["chunk_log_prob"][number]) == pytest.approx(likely, rel=1e-5)
            for name in ("head_ids", "head_logits", "tail_log_partition"):
                np.testing.assert_array_equal(targets[name][number], decoded[name][place_T[theirs[0] - 1]])
            inside = [before + place_S[s - 1] for s in ours]
            assert (targets["chunk_of"] == number).nonzero()[:, 0].tolist() == inside
            if teacher.target_mask_S[theirs[-1]] and student.target_mask_S[ours[-1]]:
                assert targets["chunk_last"][number] == before + place_S[ours[-1]]
                assert float(targets["chunk_boundary"][number]) == pytest.approx(float(mass[place_T[theirs[-1]]]))
            else:
                assert targets["chunk_last"][number] == len(targets["chunk_of"])
                assert float(targets["chunk_boundary"][number]) == 0.0
            number += 1
        before += student.positions
    assert number == len(targets["chunk_first"]) > 50
    assert len(targets["chunk_of"]) == len(targets["chunk_label_bytes"]) == before
    assert (batch["shift_labels"] != -100).sum() == before


def test_packing_changes_nothing_but_the_shape(aligned_cache: tuple[Cache, CacheAlignment]) -> None:
    cache, alignment = aligned_cache
    rows = rows_of(aligned_cache, 8, COLUMNS)
    plain = Collator.of(AlignedRows(cache, alignment, COLUMNS))(rows)["targets"]
    packed_batch = Collator.of(AlignedRows(cache, alignment, COLUMNS), pack=True)(rows)
    packed = packed_batch["targets"]
    order = lambda found: sorted(zip(found["chunk_log_prob"].tolist(), found["head_ids"][:, 0].tolist(), strict=True))  # noqa: E731
    assert order(packed) == order(plain)
    labels = packed_batch["shift_labels"]
    labels_N = labels[labels != -100]
    assert len(labels_N) == len(packed["chunk_of"]) and "position_ids" in packed_batch


def test_layers_are_those_at_aligned_tokens(aligned_cache: tuple[Cache, CacheAlignment]) -> None:
    cache, alignment = aligned_cache
    columns = ("head_ids", "head_logits", "hidden_1", "hidden_2")
    rows = rows_of(aligned_cache, 4, columns)
    layers = Collator.of(AlignedRows(cache, alignment, columns))(rows)["layers"]
    for number, row in enumerate(rows):
        pairs = [(theirs[-1], ours[-1]) for theirs, ours in naive_chunks(row) if theirs and ours]
        student_A, teacher_A = aligned_tokens(row)
        assert list(zip(teacher_A.tolist(), student_A.tolist(), strict=True)) == pairs
        count = len(pairs)
        assert layers["student"][number, :count].tolist() == student_A.tolist()
        assert (layers["segment"][number, count:] == -1).all()
        segment_T = row.teacher.row.segment_S()
        assert layers["segment"][number, :count].tolist() == segment_T[teacher_A].tolist()
        stored = cache.targets.decoded(row.teacher.targets)
        np.testing.assert_array_equal(layers["hidden_2"][number, :count], stored["hidden_2"][teacher_A])
        begins = {"teacher": np.flatnonzero(np.diff(segment_T, prepend=-1)), "student": [0]}
        is_first = np.isin(teacher_A, begins["teacher"]) | np.isin(student_A, begins["student"])
        assert layers["first"][number, :count].tolist() == is_first.tolist() and is_first.any()
        assert layers["teacher"][number, :count].tolist() == row.teacher.row.position_ids_S()[teacher_A].tolist()


@pytest.mark.parametrize("columns", [COLUMNS, ("head_ids", "head_logits", "hidden_2"), (BOUNDARY_MASS,)])
def test_no_rows_still_make_a_batch(aligned_cache: tuple[Cache, CacheAlignment], columns: tuple[str, ...]) -> None:
    cache, alignment = aligned_cache
    batch = Collator.of(AlignedRows(cache, alignment, columns))([])
    assert batch["input_ids"].shape[0] == 1 and not (batch["shift_labels"] != -100).any()
    assert all(len(values) == 0 for values in batch["targets"].values())
    full = Collator.of(AlignedRows(cache, alignment, columns))(rows_of(aligned_cache, 2, columns))
    assert batch["targets"].keys() == full["targets"].keys()
    assert {name: values.dtype for name, values in batch["targets"].items()} == {
        name: values.dtype for name, values in full["targets"].items()
    }
    if "layers" in full:
        assert {name: values.dtype for name, values in batch["layers"].items()} == {
            name: values.dtype for name, values in full["layers"].items()
        }
        assert batch["layers"]["segment"].eq(-1).all() and isinstance(batch["layers"]["hidden_2"], torch.Tensor)
