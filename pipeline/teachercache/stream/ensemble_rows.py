"""Rows of a cache matched with what further teachers said of the same text, by source_id and byte span.

A row's id is the hash of the spans that it is made of, so that rows are matched by id. What another teacher's tokenizer cut
otherwise, or packed otherwise, has another id: it is missing there, and counted. Train rows may be held out in the other
cache, and the other way round: they are looked for in both splits.

The match is one array of 8 bytes a row for each further cache, made once in a process (`cache.row_keys`). Of caches in object
stores it needs every shard: `stream.local_bytes` that hold all of them have them fetched once.

Shapes: N positions of a micro-batch, n of them at which a teacher speaks; S tokens of a row, P its positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.cache import Cache, StoredRow
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.row_keys import Keys, row_keys
from teachercache.cache.shards.shard_set import SPLITS, Split
from teachercache.stream.aligned_rows import AlignedPair, chunk_arrays
from teachercache.stream.cache_rows import OwnRows, RowTensors
from teachercache.targets import StoredTargets
from teachercache.targets.logits.kind import ACTUAL
from teachercache.tokens.rows import TokenRow

Array = NDArray[Any]
MISSING = -1


@dataclass(frozen=True, eq=False)
class EnsembleRow(StoredRow):
    """A row of a cache, and what each further teacher has of it; None where its cache lacks the row."""

    other_teachers: tuple[StoredRow | AlignedPair | None, ...] = ()


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """Turns one further teacher's columns into arrays of a batch; picklable."""

    targets: StoredTargets
    columns: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """One further teacher's cache. `rows[source][split]` is each row's number in it, its train rows before its held-out
    ones, or `MISSING`; `alignment` is its alignment with the tokens of the caches that it is concatenated to."""

    cache: Cache
    alignment: CacheAlignment | None
    rows: tuple[Mapping[Split, NDArray[np.int64]], ...]

    @classmethod
    def matched_to(
        cls, caches: Sequence[Cache], cache: Cache, *, alignment: CacheAlignment | None = None
    ) -> TeacherCache:
        """Look up every row of some caches."""
        return cls(cache, alignment, matched_rows(caches, cache))

    def found(self, split: Split, *, source: int | None = None) -> int:
        """Counts the rows of a split that it has, of one cache or of all."""
        rows = self.rows if source is None else self.rows[source : source + 1]
        return sum(int((row_numbers[split] >= 0).sum()) for row_numbers in rows)

    def place(self, source: int, split: Split, index: int) -> tuple[Split, int] | None:
        """Returns the place of a row in it; None where it lacks the row."""
        number = int(self.rows[source][split][index])
        train = self.cache.rows_of("train")
        if number == MISSING:
            return None
        return ("train", number) if number < train else ("held-out", number - train)

    def read(
        self, source: int, split: Split, index: int, *, row_id: str, columns: Sequence[str]
    ) -> StoredRow | AlignedPair | None:
        """The row with these columns; None where it lacks it, or has another one of the same key."""
        place = self.place(source, split, index)
        stored = None if place is None else self.cache.read_row(*place, columns=columns, segments=False)
        if place is None or stored is None or stored.row.row_id != row_id:
            return None
        if self.alignment is None:
            return stored
        aligned = self.alignment.aligned_row(*place, stored, segments=False)
        return AlignedPair(aligned.row, stored, aligned.targets)

    def shards_beside(self, source: int, numbers: Sequence[int], of: Cache) -> list[int]:
        """The shards that hold the train rows of some shards of a cache, in the order in which these are given."""
        ends = np.cumsum(of.infos.counted("rows") - of.infos.counted("held_out_rows"))
        infos = self.cache.infos
        splits = [np.cumsum(infos.counted("rows") - infos.counted("held_out_rows"))]
        splits.append(splits[0][-1] + np.cumsum(infos.counted("held_out_rows")))
        needed: dict[int, None] = {}
        for number in numbers:
            start = int(ends[number - 1]) if number else 0
            rows = self.rows[source]["train"][start : int(ends[number])]
            rows = rows[rows >= 0]
            for within, low in zip(splits, (0, int(splits[0][-1])), strict=True):
                chosen = rows[(rows >= low) & (rows < within[-1])]
                needed.update(dict.fromkeys(np.unique(np.searchsorted(within, chosen, side="right")).tolist()))
        return list(needed)


@dataclass(frozen=True, eq=False)
class EnsembleRows:
    """Rows of the cache `source` of a run with what other teachers have of each; a `CacheRows`. `other_columns` are those that
    are read of each of `other_teachers`."""

    own: OwnRows
    source: int
    other_teachers: tuple[TeacherCache, ...]
    other_columns: tuple[tuple[str, ...], ...]

    @property
    def cache(self) -> Cache:
        """See `CacheRows`."""
        return self.own.cache

    @property
    def length(self) -> int:
        """See `CacheRows`."""
        return self.own.length

    @property
    def pad_id(self) -> int:
        """See `CacheRows`."""
        return self.own.pad_id

    @property
    def tensors(self) -> RowTensors:
        """See `CacheRows`."""
        paired = zip(self.other_teachers, self.other_columns, strict=True)
        others = tuple(TeacherTargets(teacher.cache.targets, columns) for teacher, columns in paired)
        return EnsembleTensors(self.own.tensors, others)

    def read(self, split: Split, index: int) -> EnsembleRow:
        """See `CacheRows`."""
        stored = self.own.read(split, index)
        others = (
            teacher.read(self.source, split, index, row_id=stored.row.row_id, columns=columns)
            for teacher, columns in zip(self.other_teachers, self.other_columns, strict=True)
        )
        return EnsembleRow(stored.row, stored.targets, tuple(others))


@dataclass(frozen=True, eq=False)
class EnsembleTensors:
    """Makes the tensors of the first teacher's rows, and in `targets` besides what `ensemble_targets` makes of the
    others."""

    own: RowTensors
    other_teachers: tuple[TeacherTargets, ...]

    def __call__(
        self, rows: Sequence[EnsembleRow], tokens: Sequence[TokenRow], packed_with: Sequence[Sequence[int]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        batch = self.own(rows, tokens, packed_with)
        return {**batch, "targets": batch["targets"] | ensemble_targets(rows, self.other_teachers)}


def matched_rows(caches: Sequence[Cache], cache: Cache) -> tuple[dict[Split, NDArray[np.int64]], ...]:
    """Finds each row of each of `caches` in `cache`, by split: see `TeacherCache.rows`."""
    keys = row_keys(cache)
    keys_R = np.concatenate([keys[split] for split in SPLITS])
    order_R = np.argsort(keys_R)
    sorted_R = keys_R[order_R]
    return tuple(
        {split: looked_up(wanted, sorted_R, order_R) for split, wanted in row_keys(source).items()} for source in caches
    )


def looked_up(wanted: Keys, sorted_R: Keys, order_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """`order_R` of the sorted key that equals each wanted one, or `MISSING`."""
    if not len(sorted_R):
        return np.full(len(wanted), MISSING, dtype=np.int64)
    # Both in one order: a million searches at random would wait for memory ten times as long.
    by_key = np.argsort(wanted)
    places = np.empty(len(wanted), dtype=np.int64)
    places[by_key] = np.minimum(np.searchsorted(sorted_R, wanted[by_key]), len(sorted_R) - 1)
    return np.where(sorted_R[places] == wanted, order_R[places], MISSING)


def ensemble_targets(rows: Sequence[Any], other_teachers: Sequence[TeacherTargets]) -> dict[str, torch.Tensor]:
    """Returns a batch's arrays of further teachers, under `teacher1/…`, `teacher2/…`, for the `EnsembleRow`s of a
    micro-batch:

    `at` int64 [n] the positions at which the teacher speaks, rising: all that both sides predict, or where chunks begin
    of a teacher with other tokens; `has` bool [N] whether its cache has the row; what its kind of logits decodes, [n, …];
    and with a column of the actual token `nats` float32 [n], -log p of it, a mean over a chunk's tokens in the
    student's."""
    batch = {}
    for number, other in enumerate(other_teachers):
        row_arrays = [_said(stored.row, stored.other_teachers[number], other) for stored in rows]
        before = np.cumsum([0, *(stored.row.positions for stored in rows)])
        has = [np.full(stored.row.positions, stored.other_teachers[number] is not None) for stored in rows]
        arrays: dict[str, list[Array]] = {name: [values] for name, values in _nothing(other).items()}
        for one_row, start in zip(row_arrays, before, strict=False):
            for name, values in one_row.items():
                arrays[name].append(values + start if name == "at" else values)
        concatenated = {name: np.concatenate(values) for name, values in arrays.items()}
        concatenated["has"] = np.concatenate([np.empty(0, np.bool_), *has])
        for name, values in concatenated.items():
            wide = values.astype(np.int64) if values.dtype == np.int32 else values
            batch[f"teacher{number + 1}/{name}"] = torch.from_numpy(np.ascontiguousarray(wide))
    return batch


def _said(row: TokenRow, stored: StoredRow | AlignedPair | None, of: TeacherTargets) -> dict[str, Array]:
    """Returns the arrays of one row, `at` counted among its positions; nothing where the text has other tokens in the
    two caches."""
    if stored is None or not np.array_equal(stored.row.input_ids_S, row.input_ids_S):
        return {}
    if isinstance(stored, AlignedPair):
        arrays, chunks = chunk_arrays([stored], of.targets, of.columns)
        within_n = chunks["first"]
        if ACTUAL in arrays:
            counts_n = np.bincount(chunks["of"][chunks["of"] < len(within_n)], minlength=len(within_n))
            arrays["nats"] = (-chunks["log_prob"] / np.maximum(counts_n, 1)).astype(np.float32)
    else:
        arrays = of.targets.logits.decoded({name: stored.targets[name] for name in of.columns})
        within_n = np.arange(stored.row.positions)
        if ACTUAL in arrays:
            arrays["nats"] = -arrays[ACTUAL]
    arrays.pop(ACTUAL, None)
    tokens_n = np.flatnonzero(stored.row.target_mask_S)[within_n]
    both_n = row.target_mask_S[tokens_n]
    at_n = (np.cumsum(row.target_mask_S) - 1)[tokens_n[both_n]]
    return {"at": at_n.astype(np.int64), **{name: values[both_n] for name, values in arrays.items()}}


def _nothing(of: TeacherTargets) -> dict[str, Array]:
    """The arrays of a teacher that says nothing."""
    columns = {column.name: column for column in of.targets.logits.columns}
    empty = {name: np.empty((0, *columns[name].shape), columns[name].dtype) for name in of.columns}
    arrays = of.targets.logits.decoded(empty)
    if ACTUAL in arrays:
        arrays["nats"] = -arrays.pop(ACTUAL)
    return {"at": np.empty(0, np.int64), **arrays}
