"""Bytes that are not what the manifest promises never reach training, and a killed process costs no work."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.errors import CacheDamaged, CacheError
from teachercache.training.checkpoints.completion import complete_checkpoints
from teachercache.training.job.train import run_training
from training.runs import JOB, log_of, start_job


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copied"))


def _damage_all(folder: Path, damage: str) -> None:
    """Every shard, so that the first batch meets one whatever the order is."""
    for shard in (folder / "shards").iterdir():
        if damage == "missing":
            shard.unlink()
        else:
            data = bytearray(shard.read_bytes())
            data[len(data) // 3] ^= 4
            shard.write_bytes(bytes(data) if damage == "flipped" else bytes(data[:-1]))


REASONS = {
    "missing": r"is missing",
    "truncated": r"holds \d+ bytes, the manifest says \d+",
    "flipped": r"differs from its sha256 in the manifest \(damaged bytes\)",
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", REASONS)
def test_a_shard_that_is_not_whole_ends_training_before_it_is_seen(
    make_recipe: Any, copied: Path, damage: str, workers: int
) -> None:
    _damage_all(copied, damage)
    recipe = make_recipe(cache_folder=copied, loader_workers=workers)
    remedy = "; fetch it again, or delete the cache and run `teachercache precompute` again"
    with pytest.raises(CacheDamaged, match=rf"^\S+/shards/part-\d+-\w+\.arrow {REASONS[damage]}{remedy}$"):
        run_training(recipe)
    log = recipe.train.output / "log.jsonl"
    assert not log.exists() or not log.read_text(), "no step was taken"
    assert not list(recipe.train.output.glob("checkpoint-*"))


def test_a_manifest_of_another_version_is_refused(make_recipe: Any, copied: Path) -> None:
    data = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**data, "format_version": 9, "created_by": "teachercache 9.9"}))
    recipe = make_recipe(cache_folder=copied)
    with pytest.raises(CacheError, match=r"manifest.json has format version 9, .*install a newer version") as caught:
        run_training(recipe)
    assert "\n" not in str(caught.value) and not recipe.train.output.exists()


def test_a_killed_loading_process_ends_the_job_in_one_line_and_a_rerun_goes_on(
    make_recipe: Any, tmp_path: Path
) -> None:
    import psutil

    settings = {"epochs": 20, "save_every": 10, "evaluate_every": 1000, "log_every": 10}
    killed = make_recipe(output=tmp_path / "killed", loader_workers=2, **settings)
    process = start_job(killed, tmp_path)
    while not list(killed.train.output.glob("checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.002)
    loading = [child for child in psutil.Process(process.pid).children() if str(JOB) in child.cmdline()]
    assert len(loading) >= 2
    loading[0].send_signal(signal.SIGKILL)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    document = json.loads(out)
    assert document["exit_status"] == 1
    assert document["error"].startswith("a loading process was killed (DataLoader worker (pid")
    assert document["error"].endswith("run the same command again to go on from the last checkpoint")
    assert f"error: {document['error']}" in errors.splitlines()[-1]
    newest = complete_checkpoints(killed.train.output)[-1].step
    assert run_training(killed)["resumed_from"] == newest < 120
    whole = make_recipe(output=tmp_path / "whole", **settings)
    run_training(whole)
    assert log_of(killed.train.output) == log_of(whole.train.output)
