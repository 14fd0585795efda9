"""Merged, filtered and split caches: each row as its parent has it, once, and a cache that everything else reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cache.composition.composed import FIRST, SECOND, TARGETS, TEXTS, assert_same_row, halves, rows_of
from cache.golden_caches import GOLDEN, reading
from cache.independent_reader import IndependentCache
from teachercache.cache import Cache, verify
from teachercache.cache.composition.compose import filter_rows, merge, split
from teachercache.errors import CacheError

from builders import sentences, tiny_cache, tiny_teacher

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return halves(tmp_path_factory.mktemp("halves"))


@pytest.fixture(scope="module")
def merged(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("merged") / "cache"
    return folder, merge(caches, folder, console=QUIET)


def test_a_merged_cache_has_each_row_once_and_as_its_parents_have_it(
    caches: tuple[Path, Path], merged: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = merged
    first, second = map(rows_of, caches)
    found = rows_of(folder)
    assert found.keys() == first.keys() | second.keys()
    for row_id, stored in found.items():
        assert_same_row(stored, first.get(row_id) or second[row_id])
    assert result["repeated_rows"] == len(first.keys() & second.keys()) > 0
    assert result["rows"] == len(found) and result["shards_by"]["linked"] and result["shards_by"]["written"]
    assert verify(folder) == verify(folder, deep=True) == []
    assert reading(Cache.open(folder))["order"]  # of training


def test_its_manifest_says_what_it_is_made_of(caches: tuple[Path, Path], merged: tuple[Path, dict[str, Any]]) -> None:
    manifest = Cache.open(merged[0]).manifest
    parents = [Cache.open(path).manifest for path in caches]
    assert [entry["fingerprint"] for entry in manifest.parents] == [parent.fingerprint for parent in parents]
    assert manifest.settings_fingerprint == parents[0].settings_fingerprint
    assert manifest.target_digests == parents[1].target_digests and manifest.read_by == parents[0].read_by
    audit, both = manifest.audit, len(FIRST) + len(SECOND)
    assert (audit.rows_in, audit.stored, audit.deduplicated) == (both, len(TEXTS), both - len(TEXTS))
    assert audit.extra_windows == manifest.rows - len(TEXTS) > 0
    assert manifest.fidelity["positions"] == sum(parent.fidelity["positions"] for parent in parents)
    IndependentCache(merged[0]).checked()


def test_whole_shards_are_the_files_of_their_parents(
    caches: tuple[Path, Path], merged: tuple[Path, dict[str, Any]]
) -> None:
    ours = {path.stat().st_ino for path in merged[0].rglob("*.arrow")}
    theirs = {path.stat().st_ino for path in caches[0].rglob("*.arrow")}
    assert theirs <= ours
    # ... and the bytes of its columns are those that their writer counted.
    [whole] = [filter_of(caches[0], "positions >= 0", merged[0].parent / "whole")]
    assert Cache.open(whole).manifest.column_bytes == Cache.open(caches[0]).manifest.column_bytes


def filter_of(cache: Path | str, where: str, to: Path) -> Path:
    filter_rows(cache, where, to, console=QUIET)
    return to


def test_caches_that_may_not_be_joined_are_refused_in_a_line(caches: tuple[Path, Path], tmp_path: Path) -> None:
    first, teacher = caches[0], caches[0].parent.parent / "teacher"
    wrong = {
        "settings.sequence.length is 40, not 48": {"sequence": {"length": 40}},
        "targets.logits.k is 7, not 6": {"targets": {**TARGETS, "logits": {**TARGETS["logits"], "k": 7}}},
        "calibrated by itself; precompute it again with targets.calibration_from": {},
        "settings.teacher.weights_sha256 is ": {"teacher": tiny_teacher(tmp_path / "other", seed=4)},
    }  # fmt: skip
    for number, (message, sections) in enumerate(wrong.items()):
        settings = {"teacher": teacher, "texts": SECOND, "targets": TARGETS, **sections}
        other = tiny_cache(tmp_path / str(number), **settings)
        with pytest.raises(CacheError, match=message) as refused:
            merge([first, other], tmp_path / "to", console=QUIET)
        assert "\n" not in str(refused.value) and not (tmp_path / "to").exists()
    given = {**TARGETS, "calibration_from": str(first)}
    other = tiny_cache(tmp_path / "held", teacher=teacher, texts=SECOND, targets=given, corpus={"held_out": 0.5})
    with pytest.raises(CacheError, match=r"holds out other documents than .*: corpus.held_out is 0.5, not 0.2"):
        merge([first, other], tmp_path / "to", console=QUIET)


def test_caches_of_format_1_are_refused_and_those_of_format_2_are_taken(tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match="has format version 1, whose shards belong to that one cache; precompute it again"
    ):
        filter_rows(GOLDEN / "v1" / "layers", "positions > 3", tmp_path / "old", console=QUIET)
    for name in ("layers", "packed", "chat", "top-k"):
        parent, half = GOLDEN / "v2" / name, tmp_path / name
        filter_rows(parent, "draw < 0.6", half, console=QUIET)
        rows, whole = rows_of(half), rows_of(parent)
        assert rows.keys() < whole.keys() and verify(half, deep=True) == []
        for row_id, stored in rows.items():
            assert_same_row(stored, whole[row_id])


EXPRESSIONS = {
    "split == 'held-out'": lambda row: row.held_out,
    "positions >= 20 and not tokens > 30": lambda row: row.positions >= 20 and row.length <= 30,
    "draw < 0.5": lambda row: int(row.segments[0].source_id[:16], 16) / 2**64 < 0.5,
    "segments == 1 and source == 'corpus.jsonl' and 10 < tokens <= 20": lambda row: 10 < row.length <= 20,
}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_a_filtered_cache_has_the_rows_that_are_asked_for(
    caches: tuple[Path, Path], tmp_path: Path, where: str
) -> None:
    whole = rows_of(caches[0])
    wanted = {row_id for row_id, stored in whole.items() if EXPRESSIONS[where](stored.row)}
    found = rows_of(filter_of(caches[0], where, tmp_path / "some"))
    assert found.keys() == wanted and wanted
    for row_id, stored in found.items():
        assert_same_row(stored, whole[row_id])
    audit = Cache.open(tmp_path / "some").manifest.audit
    assert audit.stored == audit.rows_in == len({s.row.segments[0].source_id for s in found.values()})


def test_rows_are_found_by_their_ids(caches: tuple[Path, Path], tmp_path: Path) -> None:
    rows = list(rows_of(caches[0]).values())
    row_id, source_id = rows[3].row.row_id, rows[5].row.segments[0].source_id
    where = f"row_id in ('{row_id}', '') or '{source_id}' in source_ids"
    wanted = {row_id, *(s.row.row_id for s in rows if s.row.segments[0].source_id == source_id)}
    assert rows_of(filter_of(caches[0], where, tmp_path / "some")).keys() == wanted


def test_what_is_split_is_there_once_and_can_be_merged_again(caches: tuple[Path, Path], tmp_path: Path) -> None:
    result = split(caches[0], "draw < 0.5", tmp_path / "a", tmp_path / "b", console=QUIET)
    one, other, whole = (rows_of(path) for path in (tmp_path / "a", tmp_path / "b", caches[0]))
    assert not one.keys() & other.keys() and one.keys() | other.keys() == whole.keys()
    assert result["chosen"]["rows"] == len(one) and result["rest"]["rows"] == len(other)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "again", console=QUIET)
    again = rows_of(tmp_path / "again")
    assert again.keys() == whole.keys() and verify(tmp_path / "again", deep=True) == []


def test_rows_of_several_corpora_can_be_told_apart(caches: tuple[Path, Path], tmp_path: Path) -> None:
    corpus = tmp_path / "letters.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(12, seed=8)))
    given = {**TARGETS, "calibration_from": str(caches[0])}
    teacher = caches[0].parent.parent / "teacher"
    letters = tiny_cache(tmp_path / "l", teacher=teacher, corpus={"source": str(corpus)}, targets=given)
    merge([caches[0], letters], tmp_path / "both", console=QUIET)
    manifest = Cache.open(tmp_path / "both").manifest
    assert manifest.corpus["source"] == "corpus.jsonl + letters.jsonl" and len(manifest.sources) == 2
    found = rows_of(filter_of(tmp_path / "both", "source == 'letters.jsonl'", tmp_path / "back"))
    assert found.keys() == rows_of(letters).keys()
    assert Cache.open(tmp_path / "back").manifest.corpus["source"] == "letters.jsonl"


MISTAKES = {
    "positions >": "it is no expression",
    "position > 3": "no row has position; a row has row_id",
    "positions > 'a'": "'>' not supported between instances of 'int' and 'str'",
    "__import__('os')": "only comparisons, in, and, or and not are possible",
    "source_id.upper() == 'A'": "only comparisons, in, and, or and not are possible",
    "positions > 10**9": "only comparisons, in, and, or and not are possible",
    "positions > 100000": "no row of .* is so, and a cache of none is not written",
}


@pytest.mark.parametrize("where", MISTAKES)
def test_a_mistake_in_an_expression_is_a_line(caches: tuple[Path, Path], tmp_path: Path, where: str) -> None:
    with pytest.raises(CacheError, match=MISTAKES[where]) as refused:
        filter_rows(caches[0], where, tmp_path / "to", console=QUIET)
    assert "\n" not in str(refused.value)


def test_folders_that_are_in_the_way_are_left_alone(caches: tuple[Path, Path], tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for folder, message in {
        full: "exists and holds no cache of ours",
        caches[1]: "holds another cache",
        caches[0] / "inside": "is in .* itself; choose a folder outside of it",
    }.items():
        with pytest.raises(CacheError, match=message):
            filter_rows(caches[0], "positions > 3", folder, console=QUIET)
    assert [path.name for path in full.iterdir()] == ["notes.txt"] and verify(caches[1]) == []


def test_running_again_does_nothing(caches: tuple[Path, Path], tmp_path: Path) -> None:
    first = filter_rows(caches[0], "positions > 10", tmp_path / "to", console=QUIET)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")}
    again = filter_rows(caches[0], "positions > 10", tmp_path / "to", console=QUIET)
    assert again["fingerprint"] == first["fingerprint"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")}


@pytest.fixture
def other_disk() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"teachercache-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_shards_on_another_file_system_are_copied(caches: tuple[Path, Path], other_disk: Path) -> None:
    if other_disk.stat().st_dev == caches[0].stat().st_dev:
        pytest.skip("one file system")
    result = filter_rows(caches[0], "positions >= 0", other_disk / "to", console=QUIET)
    assert result["shards_by"]["copied"] == result["shards"] and verify(other_disk / "to") == []


def test_a_damaged_shard_is_not_cut_or_copied(caches: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(caches[0], tmp_path / "damaged"))
    shard = damaged / Cache.open(damaged).manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = command("filter", damaged, "--where", "positions > 10", "--to", tmp_path / "to", "--json")
    assert done.returncode == 1 and "differs from its sha256" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "to" / "manifest.json").exists()


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TEACHERCACHE, *map(str, arguments)], capture_output=True, text=True, check=False)


TEACHERCACHE = [sys.executable, "-m", "teachercache"]


def test_a_killed_job_goes_on_when_it_is_run_again(caches: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed as soon as the first shard that it writes has its record; what comes out is what an undisturbed job makes."""
    arguments = ["filter", str(caches[0]), "--where", "row_id < '9'", "--json", "--to"]
    killed = subprocess.Popen([*TEACHERCACHE, *arguments, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    records = tmp_path / "killed" / ".work" / "done"
    while killed.poll() is None and not (records.is_dir() and any(records.iterdir())):
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(
        CacheError, match=r"is half written; run the command that makes it \(merge, split or filter\) again"
    ):
        Cache.open(tmp_path / "killed")
    for name in ("killed", "whole"):
        assert json.loads(command(*arguments, tmp_path / name).stdout)["rows"]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_sum_of_the_columns_of_two_caches_is_that_of_both(tmp_path: Path) -> None:
    teacher, top_k = tiny_teacher(tmp_path / "teacher"), {"logits": {"kind": "top-k", "k": 4}}
    texts = sentences(30, seed=3)
    paths = [
        tiny_cache(tmp_path / str(number), teacher=teacher, texts=part, targets=top_k)
        for number, part in enumerate((texts[:14], texts[14:]))
    ]
    merge(paths, tmp_path / "both", console=QUIET)
    sums: Counter[str] = Counter()
    for path in paths:
        sums.update(Cache.open(path).manifest.column_bytes)
    assert Cache.open(tmp_path / "both").manifest.column_bytes == sums
