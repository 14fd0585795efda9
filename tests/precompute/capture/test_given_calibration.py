"""Jobs that take the calibration of another cache: their codes mean what that cache's mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache.golden_caches import GOLDEN
from teachercache.cache import Cache, verify
from teachercache.errors import CacheError
from teachercache.precompute.capture.given_calibration import check_calibration, check_loaded, take_calibration
from teachercache.precompute.capture.plan import make_plan

from builders import build_cache, sentences, tiny_cache, tiny_recipe, tiny_teacher

TARGETS: dict[str, Any] = {
    "logits": {"kind": "head+sketch", "k": 6, "rank": 8, "calibration_positions": 200},
    "hidden": {"layers": [1], "codec": "projected"},
}
TEXTS = sentences(40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("first"), teacher=teacher, texts=TEXTS[:24], targets=TARGETS)


def given(first: Path, **changed: Any) -> dict[str, Any]:
    return {**TARGETS, **changed, "calibration_from": str(first)}


def test_targets_of_other_rows_have_the_digests_of_that_cache(first: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tiny_cache(tmp_path, teacher=teacher, texts=TEXTS[24:], targets=given(first))
    ours, theirs = Cache.open(folder).manifest, Cache.open(first).manifest
    assert ours.target_digests == theirs.target_digests and ours.read_by == theirs.read_by
    assert ours.settings_fingerprint == theirs.settings_fingerprint and ours.fingerprint != theirs.fingerprint
    assert ours.calibration == {**theirs.calibration, "from": theirs.fingerprint}
    assert verify(folder, deep=True) == []


def test_the_same_rows_give_the_very_same_shards(first: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tiny_cache(tmp_path, teacher=teacher, texts=TEXTS[:24], targets=given(first))
    assert Cache.open(folder).manifest.shards == Cache.open(first).manifest.shards
    assert Cache.open(folder).manifest.fingerprint == Cache.open(first).manifest.fingerprint


def test_targets_that_are_read_by_no_file_need_none(teacher: Path, tmp_path: Path) -> None:
    targets = {"logits": {"kind": "top-k", "k": 4}}
    one = tiny_cache(tmp_path / "one", teacher=teacher, texts=TEXTS[:20], targets=targets)
    other = tiny_cache(
        tmp_path / "other", teacher=teacher, texts=TEXTS[20:], targets={**targets, "calibration_from": str(one)}
    )
    assert Cache.open(other).manifest.calibration == {}


def test_a_cache_with_other_settings_is_refused_by_the_first_of_them(
    first: Path, teacher: Path, tmp_path: Path
) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "settings.sequence.length is 40, not 48": {"sequence": {"length": 40}},
        "targets.hidden.codec is 'int8', not 'projected'": {"targets": given(first, hidden={"layers": [1]})},
        "settings.teacher.weights_sha256 is": {"teacher": tiny_teacher(tmp_path / "other", seed=5)},
        "has format version 1": {"targets": given(GOLDEN / "v1" / "layers")},
        "there is no cache at": {"targets": given(tmp_path / "nothing")},
    }
    for number, (message, sections) in enumerate(wrong.items()):
        settings = {"teacher": teacher, "texts": TEXTS[24:], "targets": given(first), **sections}
        with pytest.raises(CacheError, match=message) as refused:
            tiny_cache(tmp_path / str(number), **settings)
        assert "\n" not in str(refused.value)


def test_a_job_that_calibrated_itself_is_told_so(first: Path, teacher: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[24:], targets=TARGETS)
    build_cache(recipe, units=1)
    with pytest.raises(CacheError, match="was begun with another calibration than that of"):
        take_calibration(make_plan(recipe), str(first))
    manifest = Cache.open(build_cache(recipe)).manifest
    with pytest.raises(CacheError, match=r"are read by other files in teacher/ .* targets.calibration_from"):
        check_calibration(manifest, str(first), name="this one")


def test_a_teacher_in_another_precision_is_refused_when_it_is_loaded(
    first: Path, teacher: Path, tmp_path: Path
) -> None:
    plan = make_plan(tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[24:], targets=given(first)))
    take_calibration(plan, str(first))
    check_loaded(plan, {"dtype": "float32"})
    with pytest.raises(
        CacheError, match=r"is loaded in bfloat16, that of the cache .* was in float32; set teacher.dtype"
    ):
        check_loaded(plan, {"dtype": "bfloat16"})
