"""Finished caches that grow: new rows of their corpus, and layers of rows that are there."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from cache.composition.composed import rows_of
from cache.golden_caches import reading
from teachercache.cache import Cache, verify
from teachercache.cache.inspection import describe
from teachercache.config import PrecomputeConfig, Recipe
from teachercache.errors import CacheError, RecipeError
from teachercache.evaluation.fidelity import run_fidelity
from teachercache.precompute.capture.plan import make_plan
from teachercache.precompute.engine.cluster import connected
from teachercache.precompute.growth.job import check_unchanged, grow
from teachercache.precompute.job import run_precompute

from builders import build_cache, sentences, tiny_recipe, tiny_teacher, write_corpus
from pages import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated")  # there is no other way yet
QUIET = Console(quiet=True)
SKETCH: dict[str, Any] = {"logits": {"kind": "head+sketch", "k": 6, "rank": 8, "calibration_positions": 200}}
TEXTS = sentences(44, seed=6)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected(PrecomputeConfig(threads_per_actor=1)):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


def growing(recipe: Recipe, **changed: Any) -> Recipe:
    precompute = recipe.precompute.model_copy(update={"grow": True})
    return recipe.model_copy(update={"precompute": precompute, **changed})


def grown(recipe: Recipe, **changed: Any) -> dict[str, Any]:
    """Grow a cache, whose new rows are computed in this process."""
    return grow(growing(recipe, **changed), console=QUIET, run=build_cache)


def test_new_rows_of_a_corpus_are_added_and_no_other_is_computed(teacher: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=["", *TEXTS[:28]], targets=SKETCH)
    cache = build_cache(recipe)
    before, old, seen = Cache.open(cache).manifest, rows_of(cache), reading(Cache.open(cache))
    write_corpus(tmp_path / "corpus.jsonl", [*reversed(TEXTS), TEXTS[30], "", TEXTS[2], "  "])
    with pytest.raises(CacheError, match=r"other rows.* precompute.grow=true adds rows that are new"):
        make_plan(recipe)
    result, rows = grown(recipe), rows_of(cache)
    sources = [{stored.row.segments[0].source_id for stored in each.values()} for each in (old, rows)]
    assert sources[0] < sources[1] and len(sources[1]) == len(TEXTS)
    assert result["rows"] == len(rows) == before.rows + result["added"]["rows"] > before.rows
    assert result["snapshot"] == before.fingerprint != result["fingerprint"]
    audit = Cache.open(cache).manifest.audit
    assert (audit.stored, audit.quarantined, audit.deduplicated) == (44, 2, 1)
    assert verify(cache, deep=True) == [] and not (cache / ".work").exists()
    assert reading(Cache.open(f"{cache}@{before.fingerprint}")) == seen
    assert grown(recipe)["added"] == {"rows": 0, "positions": 0, "targets": []}
    assert check_unchanged(recipe, console=QUIET)["fingerprint"] == result["fingerprint"]
    write_corpus(tmp_path / "corpus.jsonl", [*TEXTS, "one more text, at last, for the second time that it grows"])
    assert grown(recipe)["added"]["rows"] == 1
    assert len(list((cache / "snapshots").iterdir())) == 2 and verify(cache) == []


@pytest.mark.slow
def test_layers_of_rows_that_are_there_are_what_they_would_have_been(
    cluster: None, teacher: Path, tmp_path: Path
) -> None:
    small = {"positions_per_batch": 1, "threads_per_actor": 1, "unit_rows": 8}
    hidden = {"hidden": {"layers": [0, 2], "codec": "bf16"}}
    at_once = tiny_recipe(
        tmp_path / "at-once", teacher=teacher, texts=TEXTS[:20], targets={**SKETCH, **hidden}, precompute=small
    )
    run_precompute(at_once, console=QUIET)
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[:20], targets=SKETCH, precompute=small)
    before = run_precompute(recipe, console=QUIET)
    shards = [shard.rows_file for shard in Cache.open(recipe.cache).manifest.shards]
    more = {**SKETCH, **hidden, "attention": {"layers": [1], "kind": "queries-keys"}}
    asked = tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[:20], targets=more, precompute=small)
    result = run_precompute(growing(asked), console=QUIET)
    assert result["added"] == {"rows": 0, "positions": 0, "targets": ["hidden", "attention"]}
    cache = Cache.open(recipe.cache)
    assert [shard.rows_file for shard in cache.manifest.shards] == shards
    assert set(cache.manifest.groups) == {"shards", "targets/hidden", "targets/attention"}
    assert verify(recipe.cache, deep=True) == []
    wanted, found = rows_of(at_once.cache), rows_of(recipe.cache)
    assert wanted.keys() == found.keys()
    for row_id, stored in found.items():
        for layer in (0, 2):
            np.testing.assert_array_equal(stored.targets[f"hidden_{layer}"], wanted[row_id].targets[f"hidden_{layer}"])
    fidelity = run_fidelity(cache, teacher=str(teacher), rows=4)
    assert all(value > 0.999 for value in fidelity["hidden_cosine"].values()) and fidelity["attention_kl"]
    assert describe(cache)["bytes_per_position"]["hidden"] > 0
    assert not Cache.open(f"{recipe.cache}@{before['fingerprint']}").manifest.targets.keys() & {"hidden", "attention"}
    # Rows that come now have all of it.
    write_corpus(tmp_path / "corpus.jsonl", TEXTS[:26])
    assert run_precompute(growing(asked), console=QUIET)["added"]["rows"] > 0
    assert verify(recipe.cache, deep=True) == [] and set(Cache.open(recipe.cache).manifest.targets) >= set(more)


def test_another_setting_never_mixes_into_a_cache(teacher: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[:20], targets=SKETCH)
    cache = build_cache(recipe)
    write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert recipe.corpus is not None
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("settings.sequence.length is 40, not 48", {"sequence": recipe.sequence.model_copy(update={"length": 40})}),
        ("corpus.held_out is 0.5, not 0.2", {"corpus": recipe.corpus.model_copy(update={"held_out": 0.5})}),
        ("targets.logits.k is 7, not 6", {"targets": of({**SKETCH, "logits": {**SKETCH["logits"], "k": 7}}, tmp_path)}),
        ("targets.boundary_mass", {"targets": of({**SKETCH, "boundary_mass": False}, tmp_path)}),
    ]
    for message, changed in wrong:
        with pytest.raises(CacheError, match=message) as refused:
            grown(recipe, **changed)
        assert "nothing is added to it" in str(refused.value) and "\n" not in str(refused.value)
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    plain = tiny_recipe(tmp_path / "twice", teacher=teacher, texts=TEXTS[:9], corpus={"deduplicate": False})
    build_cache(plain)
    with pytest.raises(RecipeError, match="for which corpus.deduplicate must be true"):
        grown(plain)


def of(targets: dict[str, Any], folder: Path) -> Any:
    """The section that a recipe has of these targets."""
    return tiny_recipe(folder / "unused", targets=targets).targets


@pytest.mark.slow
def test_a_killed_growth_leaves_the_cache_as_it_was_and_goes_on(teacher: Path, tmp_path: Path) -> None:
    """Killed when a first unit of new rows is done; before and after it is a cache."""
    settings = {"teacher": teacher, "targets": {**SKETCH, "hidden": {"layers": [1]}}, "precompute": {"unit_rows": 20}}
    recipe = tiny_recipe(tmp_path, texts=TEXTS[:14], **settings)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    assert finished(command(file)) == 0
    manifest = (Path(recipe.cache) / "manifest.json").read_bytes()
    write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    process = command(file, "-s", "precompute.grow=true")
    done = Path(recipe.cache) / ".work" / "growth" / "rows" / "cache" / ".work" / "done"
    while process.poll() is None and not (done.is_dir() and any(done.glob("*.json"))):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (Path(recipe.cache) / "manifest.json").read_bytes() == manifest and verify(recipe.cache) == []
    assert finished(command(file, "-s", "precompute.grow=true")) == 0
    audit = dataclasses.asdict(Cache.open(recipe.cache).manifest.audit)
    assert (audit["rows_in"], audit["stored"]) == (44, 44) and verify(recipe.cache, deep=True) == []


def command(file: Path, *arguments: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT / "pipeline"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "teachercache", "precompute", str(file), "--json", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def finished(process: subprocess.Popen[bytes]) -> int:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert json.loads(out)["rows"]
    return process.returncode
