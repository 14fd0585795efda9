"""Joining caches by their rows, and what a batch holds of further teachers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.cache import Cache
from teachercache.cache.row_keys import row_keys
from teachercache.errors import CacheDamaged
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.dataset import CacheDataset
from teachercache.stream.ensemble_rows import MISSING, EnsembleRow, EnsembleRows, TeacherCache, looked_up, matched_rows
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.targets.logits.kind import ACTUAL

from builders import aligned, other_tokenizer, sentences, tiny_cache, tiny_model, tiny_teacher, tiny_tokenizer

SPLITS = ("train", "held-out")
TOP_K = {"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Caches of two teachers; the second one's has other shards, other held-out rows, lacks some and has some of its own."""
    made = []
    texts = sentences(24)
    for name, seed, own, corpus in (("a", 0, texts, {"held_out": 0.2}), ("b", 5, texts[::-1][:16], {"held_out": 0.5})):
        folder = tmp_path_factory.mktemp(name)
        teacher = tiny_teacher(folder / "teacher", seed=seed)
        own = [*own, *sentences(3, seed=seed + 40)]
        made.append(
            tiny_cache(folder, teacher=teacher, texts=own, corpus=corpus, targets=TOP_K, precompute={"unit_rows": 5})
        )
    return made[0], made[1]


@pytest.fixture(scope="module")
def caches(folders: tuple[Path, Path]) -> tuple[Cache, Cache]:
    return Cache.open(folders[0]), Cache.open(folders[1])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the first one's text in other tokens, aligned with it."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = other_tokenizer()
    tiny_model(vocabulary=len(tokenizer), seed=7).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    targets = {"logits": {"kind": "full", "dtype": "float32"}}
    made = tiny_cache(folder, teacher=folder / "teacher", texts=sentences(24), targets=targets, sequence={"length": 90})
    tiny_tokenizer().save_pretrained(folder / "reader")
    aligned(made, folder / "reader")
    return Cache.open(made)


def _ids(cache: Cache) -> dict[str, list[str]]:
    return {
        split: [cache.read_row(split, index, columns=()).row.row_id for index in range(cache.rows_of(split))]  # type: ignore[arg-type]
        for split in SPLITS
    }


def test_keys_are_the_beginning_of_each_rows_id(caches: tuple[Cache, Cache]) -> None:
    for cache in caches:
        keys, ids = row_keys(cache), _ids(cache)
        for split in SPLITS:
            assert [f"{key:016x}" for key in keys[split].tolist()] == [each[:16] for each in ids[split]]  # type: ignore[index]
        assert len(ids["held-out"]) > 0


def test_every_row_is_found_whatever_its_split(caches: tuple[Cache, Cache]) -> None:
    first, second = caches
    ids, of_second = _ids(first), _ids(second)
    places = {row_id: (split, index) for split in SPLITS for index, row_id in enumerate(of_second[split])}
    other_teachers = TeacherCache.matched_to([first], second)
    crossed = 0
    for split in SPLITS:
        for index, row_id in enumerate(ids[split]):
            place = other_teachers.place(0, split, index)  # type: ignore[arg-type]
            assert place == places.get(row_id)
            crossed += place is not None and place[0] != split
        found = sum(row_id in places for row_id in ids[split])
        assert other_teachers.found(split) == found == other_teachers.found(split, source=0)  # type: ignore[arg-type]
        assert 0 < found < len(ids[split]) or split == "held-out"
    assert crossed > 0


@given(
    wanted=st.lists(st.integers(0, 30), max_size=20),
    there=st.lists(st.integers(0, 30), max_size=20, unique=True),
)
def test_looking_up_is_a_dictionary(wanted: list[int], there: list[int]) -> None:
    keys = np.array(there, dtype=np.uint64)
    order = np.argsort(keys)
    found = looked_up(np.array(wanted, dtype=np.uint64), keys[order], order)
    assert found.tolist() == [there.index(key) if key in there else MISSING for key in wanted]


def test_a_row_of_the_same_key_and_another_id_is_missing(caches: tuple[Cache, Cache]) -> None:
    first, second = caches
    rows = matched_rows([first], second)[0]
    index = int(np.flatnonzero(rows["train"] >= 0)[0])
    wrong = {
        **rows,
        "train": np.where(rows["train"] == rows["train"][index], (rows["train"][index] + 1) % 5, rows["train"]),
    }
    row_id = first.read_row("train", index, columns=()).row.row_id
    right = TeacherCache(second, None, (rows,)).read(0, "train", index, row_id=row_id, columns=())
    assert right is not None and right.row.row_id == row_id
    assert TeacherCache(second, None, (wrong,)).read(0, "train", index, row_id=row_id, columns=()) is None


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_holds_what_further_teachers_have_of_its_rows(
    caches: tuple[Cache, Cache], foreign: Cache, pack: bool
) -> None:
    """Packing reorders rows; arrays follow."""
    from teachercache.stream.alignment import alignment_for

    first, second = caches
    alignment = alignment_for(foreign, teacher_tokenizer(first), student="reader")
    assert alignment is not None
    other_teachers = [
        TeacherCache.matched_to([first], second),
        TeacherCache.matched_to([first], foreign, alignment=alignment),
    ]
    columns = [tuple(column.name for column in each.cache.kind.columns) for each in other_teachers]
    own = first.kind.objective_columns("ghost")
    others = EnsembleRows(OwnRows(first, own), 0, tuple(other_teachers), tuple(columns))
    rows = list(range(0, first.rows_of("train"), 2))
    taught: Any = CacheDataset([others], "train").__getitems__(rows).rows
    batch = Collator.of(others, pack=pack)(taught)["targets"]
    plain = Collator.of(OwnRows(first, own), pack=pack)(taught)["targets"]
    assert all((batch[name] == plain[name]).all() for name in plain)
    # Positions of the batch by row, from where each row's own targets went.
    start_of = _starts(taught, batch["head_logits"].numpy())
    has_N = np.zeros(len(batch["head_logits"]), dtype=bool)
    said = dict(zip(batch["teacher1/at"].tolist(), batch["teacher1/nats"].tolist(), strict=True))
    foreign_at = set(batch["teacher2/at"].tolist())
    for row, start in zip(taught, start_of, strict=True):
        theirs = row.other_teachers[0]
        places = range(start, start + row.row.positions)
        if theirs is None:
            assert not any(place in said for place in places)
            continue
        has_N[start : start + row.row.positions] = True
        nats = -second.kind.decoded(theirs.targets)[ACTUAL]
        assert [said[place] for place in places] == pytest.approx(nats.tolist())
    np.testing.assert_array_equal(batch["teacher1/has"].numpy(), has_N)
    assert batch["teacher1/at"].tolist() == sorted(said) and len(said) == has_N.sum()
    assert 0 < len(foreign_at) < len(has_N) and batch["teacher2/at"].tolist() == sorted(foreign_at)
    _check_foreign(taught, start_of, batch, foreign)
    nothing = Collator.of(others, pack=pack)([])["targets"]
    assert nothing.keys() == batch.keys() and not len(nothing["teacher1/at"])
    assert all(nothing[name].dtype == batch[name].dtype for name in batch)


def _starts(rows: list[EnsembleRow], head_logits_Nk: np.ndarray[Any, Any]) -> list[int]:
    """Places at which each row's positions begin in a batch, found by what they hold."""
    starts = []
    for row in rows:
        wanted = row.targets["head_logits"].astype(np.float32)
        fits = [
            start
            for start in range(len(head_logits_Nk) - len(wanted) + 1)
            if np.array_equal(head_logits_Nk[start : start + len(wanted)], wanted)
        ]
        assert len(fits) == 1
        starts.append(fits[0])
    return starts


def _check_foreign(rows: list[EnsembleRow], starts: list[int], batch: Any, foreign: Cache) -> None:
    """The teacher's distribution at the beginning of a chunk, over the token that it gives next to the same bytes."""
    checked = 0
    at = batch["teacher2/at"].tolist()
    for row, start in zip(rows, starts, strict=True):
        pair: Any = row.other_teachers[1]
        if pair is None:
            continue
        decoded = foreign.kind.decoded(pair.teacher.targets)["log_probs"]
        student_ends = np.cumsum(pair.alignment["student_counts"])
        teacher_ends = np.cumsum(pair.alignment["teacher_counts"])
        before = np.cumsum(pair.teacher.row.target_mask_S)
        for place, (end_s, end_t) in enumerate(zip(student_ends[:-1], teacher_ends[:-1], strict=True)):
            position = start + int(row.row.target_mask_S[: end_s - 1].sum())
            if position in at and pair.alignment["aligned"][place + 1] and row.row.target_mask_S[end_s - 1]:
                ours = batch["teacher2/log_probs"][at.index(position)].numpy()
                np.testing.assert_array_equal(ours, decoded[before[end_t - 1] - 1])
                checked += 1
    assert checked == len(at)


def test_what_goes_with_a_shard(caches: tuple[Cache, Cache]) -> None:
    first, second = caches
    other_teachers = TeacherCache.matched_to([first], second)
    of_second = {row_id: number for number in range(len(second.infos)) for row_id in _ids_of_shard(second, number)}
    found = 0
    for number, info in enumerate(first.infos):
        train = _ids_of_shard(first, number)[: info.rows - info.held_out_rows]
        expected = {of_second[row_id] for row_id in train if row_id in of_second}
        assert set(other_teachers.shards_beside(0, [number], first)) == expected
        found += len(expected)
    assert found > 0
    assert other_teachers.shards_beside(0, [], first) == []


def _ids_of_shard(cache: Cache, number: int) -> list[str]:
    shard = cache.shard(number)
    return [shard.read_row(index, (), cache.recent).row.row_id for index in range(cache.infos[number].rows)]


@pytest.mark.parametrize("cut", [0, 8, 300])
def test_files_that_hold_no_ids_are_refused(folders: tuple[Path, Path], tmp_path: Path, cut: int) -> None:
    shutil.copytree(folders[1], tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CacheDamaged, match=rf"^\S*{shard.name} cannot be trusted: [^\n]*fetch the cache again"):
        row_keys(Cache.open(tmp_path / "cache"))


def test_a_shard_with_other_rows_than_the_manifest_says_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "cache")
    shards = sorted((tmp_path / "cache" / "shards").iterdir(), key=lambda path: path.stat().st_size)
    shutil.copy(shards[-1], shards[0])  # the last one is smaller than the others
    with pytest.raises(CacheDamaged, match=r"rows, the manifest says"):
        row_keys(Cache.open(tmp_path / "cache"))
