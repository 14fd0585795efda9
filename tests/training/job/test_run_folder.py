"""A run folder knows whose run it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teachercache.config import parse_recipe
from teachercache.errors import RecipeError
from teachercache.training.job.run_folder import RunFolder, RunIdentity


def _identity(
    cache: str = "f1", weights: str = "w1", deepspeed: dict[str, Any] | None = None, **train: Any
) -> RunIdentity:
    data = {"cache": "c", "student": {"model": "s"}, "train": {"output": "run", **train}}
    return RunIdentity(parse_recipe(data, origin="tests"), cache, {"weights_sha256": weights}, deepspeed)


def _claimed(path: Path, identity: RunIdentity) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(identity)
    (path / "checkpoint-1").mkdir()
    return folder


def test_the_same_run_is_welcome_again(tmp_path: Path) -> None:
    _claimed(tmp_path, _identity()).check_identity(_identity(output="elsewhere", log_every=3, micro_batch=2))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (_identity(cache="f2"), 'cache was "f1", now "f2"'),
        (_identity(weights="w2"), 'student.weights_sha256 was "w1", now "w2"'),
        (_identity(seed=1), "train.seed was 0, now 1"),
        (_identity(zero_stage=3), "train.zero_stage was 1, now 3"),
        (_identity(deepspeed={"a": 1}), "deepspeed was null, now"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, other: RunIdentity, words: str) -> None:
    folder = _claimed(tmp_path, _identity())
    with pytest.raises(RecipeError, match=words):
        folder.check_identity(other)


def test_run_json_holds_the_recipe(tmp_path: Path) -> None:
    identity = _identity(epochs=2)
    _claimed(tmp_path, identity)
    data = json.loads((tmp_path / "run.json").read_text())
    assert parse_recipe(data["recipe"], origin="run.json") == identity.recipe
    assert data["cache_fingerprint"] == "f1"


def test_settings_newer_than_the_run_have_their_defaults(tmp_path: Path) -> None:
    folder = _claimed(tmp_path, _identity())
    data = json.loads((tmp_path / "run.json").read_text())
    del data["recipe"]["train"]["schedule"], data["recipe"]["objective"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    folder.check_identity(_identity())
