"""Rows in a student's tokens, aligned with the teacher's rows of the same text: what a loss across tokenizers compares.

A chunk of the alignment counts where both sides predict all of its tokens. Before it both have read the same bytes, so that
their next tokens can be compared; its likelihood is that of its tokens, one after the other.

Shapes: S tokens, N positions of a row, M chunks, A aligned tokens. Of the teacher's side: T tokens, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import StoredRow
from teachercache.targets import StoredTargets
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS
from teachercache.targets.logits.kind import ACTUAL
from teachercache.tokens.rows import TokenRow

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """`row` in the student's tokens, the cache's row, and the columns of their alignment."""

    row: TokenRow
    teacher: StoredRow
    alignment: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of all chunks of a row: first token and number of tokens of each, and which of them are wholly predicted."""

    first_M: Array
    count_M: Array
    positions_S: Array  # how many positions come before each token
    mask_S: Array

    @classmethod
    def of(cls, row: TokenRow, count_M: Array) -> Side:
        """From the chunks' numbers of tokens, which together are the row's."""
        count_M = count_M.astype(np.int64)
        before = np.concatenate([[0], np.cumsum(row.target_mask_S)])
        return cls(np.cumsum(count_M) - count_M, count_M, before, row.target_mask_S)

    @property
    def is_predicted_M(self) -> Array:
        """Token j is predicted at token j - 1."""
        starts = np.maximum(self.first_M - 1, 0)
        predicted = self.positions_S[np.maximum(self.first_M + self.count_M - 1, 0)] - self.positions_S[starts]
        is_predicted_M: Array = (self.first_M > 0) & (self.count_M > 0) & (predicted == self.count_M)
        return is_predicted_M

    def position_M(self, chosen: Array) -> Array:
        """The position that predicts the first token of each chosen chunk, among the row's."""
        positions_M: Array = self.positions_S[self.first_M[chosen] - 1]
        return positions_M

    def last_M(self, chosen: Array) -> Array:
        """The last token of each chosen chunk."""
        return self.first_M[chosen] + self.count_M[chosen] - 1


def chunk_arrays(
    rows: Sequence[AlignedPair], targets: StoredTargets, columns: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(what the kind of logits decodes, where each chunk begins [M, …]; the arrays of `cross_tokenizer.batch.Chunks`), for the
    rows of a micro-batch, whose positions follow each other."""
    of_logits = [column.name for column in targets.logits.columns if column.name in columns]
    decoded, chunks, before = [], [], 0
    count = 0
    for stored in rows:
        arrays = targets.logits.decoded({name: stored.teacher.targets[name] for name in of_logits}) if of_logits else {}
        boundary_P = _boundary(stored, targets, columns)
        at_begin, row_chunks = _row_chunks(stored, arrays, boundary_P)
        for name in ("first", "last"):
            row_chunks[name] = np.where(row_chunks[name] < 0, -1, row_chunks[name] + before)
        row_chunks["of"] = np.where(row_chunks["of"] < 0, -1, row_chunks["of"] + count)
        before, count = before + stored.row.positions, count + len(row_chunks["first"])
        decoded.append(at_begin)
        chunks.append(row_chunks)
    concatenated = {name: np.concatenate([values[name] for values in chunks]) for name in chunks[0]}
    concatenated["last"] = np.where(concatenated["last"] < 0, before, concatenated["last"])
    concatenated["of"] = np.where(concatenated["of"] < 0, count, concatenated["of"])
    return {name: np.concatenate([arrays[name] for arrays in decoded]) for name in decoded[0]}, concatenated


def _boundary(stored: AlignedPair, targets: StoredTargets, columns: Sequence[str]) -> Array | None:
    if BOUNDARY_MASS not in columns:
        return None
    return targets.decoded({BOUNDARY_MASS: stored.teacher.targets[BOUNDARY_MASS]})[BOUNDARY_MASS]


def _row_chunks(
    stored: AlignedPair, arrays: Mapping[str, Array], boundary_P: Array | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    teacher = Side.of(stored.teacher.row, stored.alignment["teacher_counts"])
    student = Side.of(stored.row, stored.alignment["student_counts"])
    chosen = np.flatnonzero((stored.alignment["aligned"] > 0) & teacher.is_predicted_M & student.is_predicted_M)
    first_M, begins_M = student.position_M(chosen), teacher.position_M(chosen)
    of_N = np.full(stored.row.positions, -1, dtype=np.int64)
    of_N[_ranges(first_M, student.count_M[chosen])] = np.repeat(np.arange(len(chosen)), student.count_M[chosen])
    log_prob_M = np.zeros(len(chosen), dtype=np.float32)
    if ACTUAL in arrays:
        summed = np.concatenate([[0.0], np.cumsum(arrays[ACTUAL], dtype=np.float64)])
        log_prob_M = (summed[begins_M + teacher.count_M[chosen]] - summed[begins_M]).astype(np.float32)
    last_T, last_S = teacher.last_M(chosen), student.last_M(chosen)
    goes_on = teacher.mask_S[last_T] & student.mask_S[last_S]
    boundary_M = np.zeros(len(chosen), dtype=np.float32)
    if boundary_P is not None:
        boundary_M[goes_on] = boundary_P[teacher.positions_S[last_T[goes_on]]]
    chunks = {
        "first": first_M,
        "last": np.where(goes_on, student.positions_S[last_S], -1),
        "of": of_N,
        "log_prob": log_prob_M,
        "boundary": boundary_M,
        "label_bytes": stored.alignment["token_bytes"][1:][stored.row.target_mask_S[:-1]].astype(np.int64),
    }
    return {name: values[begins_M] for name, values in arrays.items()}, chunks


def _ranges(first_M: Array, count_M: Array) -> Array:
    """first, first + 1, …, count of them, chunk after chunk."""
    starts = np.repeat(first_M - np.cumsum(count_M) + count_M, count_M)
    return starts + np.arange(int(count_M.sum()))


def aligned_tokens(stored: AlignedPair) -> tuple[Array, Array]:
    """(student's, teacher's) token that each aligned chunk ends with, [A] each: there both have read the same bytes."""
    teacher = Side.of(stored.teacher.row, stored.alignment["teacher_counts"])
    student = Side.of(stored.row, stored.alignment["student_counts"])
    is_chunk_M = (stored.alignment["aligned"] > 0) & (teacher.count_M > 0) & (student.count_M > 0)
    chosen = np.flatnonzero(is_chunk_M)
    return student.last_M(chosen), teacher.last_M(chosen)
