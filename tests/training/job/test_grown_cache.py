"""Runs that began before their cache got more rows go on with the rows that they began with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from teachercache.cache import Cache
from teachercache.cache.composition.append import appended
from teachercache.cache.manifest.snapshots import replace_manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.evaluation.recipe import run_evaluation
from teachercache.training.checkpoints.completion import complete_checkpoints
from teachercache.training.job.train import run_training
from training.runs import log_of

from builders import sentences, tiny_cache, tiny_teacher


def test_a_run_goes_on_in_the_cache_that_it_began_with(make_recipe: Any, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    recipe = make_recipe(cache_folder=folder, output=tmp_path / "run", save_every=3)
    whole = run_training(recipe)
    log, weights = log_of(recipe.train.output), weights_of(recipe)
    first, *later = complete_checkpoints(recipe.train.output)
    for checkpoint in later:  # as if it had been killed before
        shutil.rmtree(checkpoint.folder)
    shutil.rmtree(recipe.train.output / "student")
    (recipe.train.output / "summary.json").unlink()
    grow(folder, tmp_path)
    again = run_training(recipe)
    assert again["resumed_from"] == first.step < 9 and again["losses"] == whole["losses"]
    assert log_of(recipe.train.output) == log and weights_of(recipe) == weights
    # A new run takes all rows; what was trained is compared on the rows that were held out from it.
    new = make_recipe(cache_folder=folder, output=tmp_path / "new")
    assert run_training(new)["losses"] != whole["losses"]
    rows = Cache.open(folder, as_of=Cache.open(cache).manifest.fingerprint).rows_of("held-out")
    table = run_evaluation(recipe.train.output, teacher=str(tmp_path / "teacher"))
    assert table["student_after"]["rows"] == rows < Cache.open(folder).rows_of("held-out")


def grow(folder: Path, work: Path) -> None:
    """Add rows to the cache."""
    targets = {"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}}
    teacher = tiny_teacher(work / "teacher")
    more = tiny_cache(work / "more", teacher=teacher, texts=sentences(30, seed=77), targets=targets)
    cache = Cache.open(folder)
    replace_manifest(
        appended(cache, Cache.open(more), lambda: None, by="grow"), LocalStore(folder), before=cache.manifest
    )


def weights_of(recipe: Any) -> bytes:
    return (recipe.train.output / "student" / "model.safetensors").read_bytes()
