"""Estimates, beside the cache that the job's stages then make."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from teachercache.cache import Cache
from teachercache.config import Recipe
from teachercache.errors import CorpusError, RecipeError
from teachercache.precompute.estimate.break_even import RunTimes
from teachercache.precompute.estimate.choice import chosen, padded_tokens
from teachercache.precompute.estimate.counts import ratio_error
from teachercache.precompute.estimate.devices import DEVICES, SHARE_OF_PEAK, Device
from teachercache.precompute.estimate.job import Question, run_estimate
from teachercache.precompute.estimate.rendering import estimate_table
from teachercache.tokens.rows import TokenRow

from builders import aligned, build_cache, other_student, sentences, tiny_recipe, tiny_teacher
from pages import ROOT, text_of

SKETCH = {"kind": "head+sketch", "k": 8, "rank": 16, "step": 0.16, "calibration_positions": 1024}
UNITS = {"unit_rows": 64, "positions_per_batch": 256, "threads_per_actor": 1}
QUICK = Question(seconds=0.4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


def estimated(recipe: Recipe, question: Question = QUICK) -> dict:
    return run_estimate(recipe, question, console=Console(stderr=True, quiet=True))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_positions_and_bytes_are_those_of_the_cache_that_is_made(tmp_path: Path, teacher: Path, layout: str) -> None:
    """With hidden states, attention maps and an alignment, from a part of the rows."""
    student = other_student(tmp_path / "student")
    targets = {"logits": SKETCH, "hidden": {"layers": [1]}, "attention": {"kind": "maps", "layers": [2]}}
    recipe = tiny_recipe(
        tmp_path, teacher=teacher, texts=sentences(300), targets=targets, precompute=UNITS,
        sequence={"layout": layout, "length": 64}, align=[str(student)],
    )  # fmt: skip
    said = estimated(recipe)
    cache = Cache.open(build_cache(recipe))
    aligned(cache.folder, student)
    manifest = cache.manifest
    assert said["sample"]["positions"] < manifest.positions
    assert (said["positions"], said["rows"]) == (manifest.positions, manifest.rows)
    assert said["units"] == len(manifest.shards) and said["sampling_error"] == 0
    assert said["bytes"] == pytest.approx(bytes_in(cache.folder), rel=0.15)
    parts = said["bytes_by_part"]
    for section in ("logits", "hidden", "attention"):
        stored = manifest.bytes_per_position()[section] * manifest.positions
        assert parts[section] == pytest.approx(stored, rel=0.15)
    assert said["bytes"] == sum(parts.values()) and f"aligned with {student}" in parts


def test_a_sample_of_a_larger_corpus_says_how_sure_it_is(tmp_path: Path, teacher: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=sentences(1500, words=1000), precompute=UNITS)
    said = estimated(recipe)
    assert said["counted_by"] == "sizes of files" and 0 < said["sampling_error"] < 0.05
    assert said["documents"] == pytest.approx(1500, rel=0.05)
    assert said["hours"] > 0 and said["processor_hours"] > 0
    assert estimated(tiny_recipe(tmp_path / "few", teacher=teacher, corpus={"limit": 7}))["documents"] == 7


def test_the_table_has_80_columns_and_says_what_is_not_measured(tmp_path: Path, teacher: Path) -> None:
    question = Question(seconds=0.2, device="l40s", devices=4, student_runs=3, teacher_changes=1)
    said = estimated(tiny_recipe(tmp_path, teacher=teacher, targets={"logits": SKETCH}), question)
    assert said["on_devices"]["device"] == "L40S" and said["on_devices"]["hours"] > 0
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(estimate_table(said))
    printed = console.export_text()
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    for part in ("4 × L40S", "by a roofline", "cache pays", "3 runs", "a month at $0.023"):
        assert part in printed
    assert "nothing was measured on a L40S" in " ".join(printed.split())


def row_of(length: int) -> TokenRow:
    return TokenRow("", False, np.zeros(length, np.int32), np.ones(length, np.bool_), ())


@pytest.mark.parametrize("changes", [0, 3])
def test_from_the_break_even_on_the_cache_takes_less_time(changes: int) -> None:
    times = RunTimes(cache_seconds=100.0, online_seconds=30.0, reading_seconds=4.0)
    runs = times.break_even_runs(teacher_changes=changes)
    assert runs is not None
    assert times.from_cache(runs, teacher_changes=changes) < times.online(runs)
    assert times.from_cache(runs - 1, teacher_changes=changes) >= times.online(runs - 1)
    assert RunTimes(100.0, 4.0, 4.0).break_even_runs(teacher_changes=changes) is None


def test_a_roofline_is_bound_by_operations_or_by_memory() -> None:
    device = Device(tflops=100, memory_gb=24, bandwidth_gb=1000)
    assert device.position_seconds(operations=2e9, parameters=10**9, positions_per_batch=4096) == pytest.approx(
        2e9 / (SHARE_OF_PEAK * 100e12)
    )
    assert device.position_seconds(operations=2e9, parameters=10**9, positions_per_batch=8) == pytest.approx(
        2e9 / (SHARE_OF_PEAK * 1000e9) / 8
    )
    assert device.holds(10**10) and not device.holds(10**10 + 1)


def test_the_guide_shows_the_table_of_devices() -> None:
    told = text_of(ROOT / "docs" / "guides" / "sizing.md")
    for name, device in DEVICES.items():
        assert f"| {name} | {device.tflops:,} | {device.memory_gb} | {device.bandwidth_gb:,} |" in told


def test_blocks_that_are_alike_leave_no_error() -> None:
    assert ratio_error([10, 20, 30], [1, 2, 3]) == 0
    assert ratio_error([10, 30], [1, 1]) == pytest.approx(0.5)
    assert ratio_error([10], [1]) == 1


def test_batches_are_chosen_from_all_lengths() -> None:
    batches = [[row_of(length)] * 4 for length in range(100, 0, -1)]
    picked = chosen(batches, seconds=1.0, token_seconds=1 / 2000)
    assert 1000 < padded_tokens(picked) < 3000
    assert {batch[0].length // 34 for batch in picked} == {0, 1, 2}
    [part] = chosen(batches, seconds=1.0, token_seconds=1 / 60)
    assert 1 <= len(part) < 4


def test_mistakes_are_told_in_a_line(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(RecipeError, match="--device H1000 is not in the table; choose one of .*H100"):
        Question(device="H1000")
    with pytest.raises(RecipeError, match="add --device KIND"):
        Question(devices=8)
    with pytest.raises(RecipeError, match="teacher"):
        estimated(tiny_recipe(tmp_path, teacher=teacher).model_copy(update={"teacher": None}))
    with pytest.raises(CorpusError, match=r"empty/corpus.jsonl: none of 3 rows can be used; the first one: empty text"):
        estimated(tiny_recipe(tmp_path / "empty", teacher=teacher, texts=["", "", ""], sequence={"add_eos": False},
                              corpus={"deduplicate": False}))  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_the_first_line_comes_before_heavy_libraries() -> None:
    code = "import sys, teachercache.precompute.estimate.job; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
