"""A document that any cache of a run holds out trains in none: real caches of one corpus with other shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.cache import Cache
from teachercache.cache.row_sources import rows_beyond
from teachercache.errors import CacheError
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.dataset import CacheDataset
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import Mixed, train_order
from teachercache.stream.withheld import Trained, trained_rows
from teachercache.tokens.rows import is_held_out

from builders import sentences, tiny_cache, tiny_teacher

TEXTS = sentences(60, words=20)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("withheld")
    teacher, made = tiny_teacher(folder / "teacher"), dict[tuple[float, str], Path]()

    def of(share: float, layout: str = "documents") -> Cache:
        if (share, layout) not in made:
            made[share, layout] = tiny_cache(
                folder / f"{share}-{layout}", teacher=teacher, texts=TEXTS,
                corpus={"held_out": share}, sequence={"layout": layout, "length": 64},
            )  # fmt: skip
        return Cache.open(made[share, layout])

    return of


def sources(cache: Cache, split: Any, index: int) -> set[str]:
    return {segment.source_id for segment in cache.read_row(split, index, columns=()).row.segments}


def trained_sources(caches: list[Cache], trained: Trained, *, epochs: int = 1) -> list[set[str]]:
    """The documents of the rows that a run reads in its steps, in order."""
    order = train_order(caches[0], [Mixed(each) for each in caches[1:]], seed=3, trained=trained)
    plan = BatchPlan(order=order, global_batch=6, micro_batch=3, world_size=2)
    dataset = CacheDataset([OwnRows(cache, ()) for cache in caches], "train", trained=trained)
    assert len(dataset) == order.rows
    by_id = {
        cache.read_row("train", n, columns=()).row.row_id: sources(cache, "train", n)
        for cache in caches
        for n in range(cache.rows_of("train"))
    }
    read = []
    for step in range(plan.steps(epochs)):
        for rank in range(2):
            for batch in plan.micro_batches(step, rank=rank):
                read += [by_id[stored.row.row_id] for stored in dataset.__getitems__(batch).rows]
    return read


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("as_teacher", [False, True], ids=["mix", "teachers"])
def test_what_one_holds_out_trains_in_none(caches, layout, as_teacher):
    own, other = caches(0.1, layout), caches(0.4)
    held_out = {source for n in range(other.rows_of("held-out")) for source in sources(other, "held-out", n)}
    rows = [sources(own, "train", n) for n in range(own.rows_of("train"))]
    assert any(row & held_out for row in rows)  # they would train
    mixed = [own] if as_teacher else [own, other]
    trained = trained_rows(mixed, [other] if as_teacher else [])
    read = trained_sources(mixed, trained, epochs=2)
    assert not set.union(*read) & held_out
    kept = [row for row in rows if not row & held_out]  # a packed row goes if any of its documents does
    whole = kept + ([] if as_teacher else [sources(other, "train", n) for n in range(other.rows_of("train"))])
    assert sorted(map(sorted, read)) == sorted(map(sorted, whole * 2))
    assert trained.share == 0.4 and len(trained.lines) == 1
    assert trained.lines[0].startswith(
        f"{len(rows) - len(kept)} of {len(rows)} rows to train on of {own.name} are left"
    )


def test_where_shares_are_equal_no_row_is_looked_at(caches):
    own = caches(0.4)
    own.source = None  # nothing could be read
    found = trained_rows([own], [caches(0.1)])
    assert (found.rows, found.share, found.lines) == ((None,), None, ())


def test_without_anything_left_out_the_order_is_what_it_was(caches):
    own = caches(0.4)
    plain, trained = (train_order(own, seed=1, trained=each) for each in (None, trained_rows([own], [caches(0.1)])))
    every = np.arange(plain.rows)
    assert plain.rows_at(0, every).tolist() == trained.rows_at(0, every).tolist()


def test_a_cache_that_another_one_holds_out_whole_is_refused(caches):
    with pytest.raises(
        CacheError, match=r"no rows to train on beside .* which holds them all out .*same corpus.held_out"
    ):
        trained_rows([caches(0.1), caches(0.999)])


@given(st.text(alphabet="0123456789abcdef", min_size=32, max_size=32), st.floats(0, 1, exclude_max=True))
def test_the_rule_over_arrays_is_the_rule_of_documents(source, share):
    import math

    value = int(source[-16:], 16)
    assert is_held_out(source, share) == (share > 0 and value <= math.ceil(share * 2**64) - 1)


def test_every_row_is_told_by_its_documents(caches):
    for layout in ("documents", "packed"):
        cache = caches(0.1, layout)
        for share in (0.0, 0.1, 0.25, 0.4, 0.9):
            expected = [
                n for n in range(cache.rows_of("train"))
                if not any(is_held_out(source, share) for source in sources(cache, "train", n))
            ]  # fmt: skip
            assert rows_beyond(cache, share).tolist() == expected
