"""Caches of attention maps: whole, described, measured; and recipes for maps that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.forgery import sign
from teachercache.cache import Cache, verify
from teachercache.cache.inspection import describe, describe_row
from teachercache.config import parse_recipe
from teachercache.errors import CacheDamaged, RecipeError
from teachercache.evaluation.fidelity import run_fidelity
from teachercache.precompute.capture.plan import make_plan
from teachercache.targets.layers.attention_maps import AttentionMaps

from builders import build_cache, tiny_cache, tiny_recipe, tiny_teacher

LOGITS = {"kind": "top-k", "k": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("made") / "teacher", layers=4)


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = {"logits": LOGITS, "attention": {"kind": "maps", "layers": [2, 4]}}
    return tiny_cache(tmp_path_factory.mktemp("maps"), teacher=teacher, targets=targets)


def test_a_cache_of_maps_is_whole_and_says_what_it_holds(cache: Path) -> None:
    assert verify(cache) == []
    opened = Cache.open(cache)
    shown = describe(opened)
    assert set(shown["bytes_per_position"]) == {"logits", "boundary_mass", "attention", "tokens", "total"}
    assert shown["targets"]["attention"]["kind"] == "maps" and shown["targets"]["attention"]["top"] is None
    assert describe_row(opened, "train:0")["tokens"][0]["target"]["top"]
    assert "attention maps of blocks 2, 4 (4 heads, all keys)" in (cache / "README.md").read_text()
    row = opened.read_row("train", 0, segments=False)  # pairs are counted by segments, asked for or not
    assert row.targets["map_4"].shape == (row.row.pairs, 4)


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("settings", [{}, {"heads": 2}, {"top": 30}], ids=str)
def test_fidelity_reports_maps(teacher: Path, tmp_path: Path, settings: dict[str, int], layout: str) -> None:
    targets = {"logits": LOGITS, "attention": {"kind": "maps", "layers": [2, 4], **settings}}
    made = tiny_cache(tmp_path, teacher=teacher, targets=targets, sequence={"length": 48, "layout": layout})
    result = run_fidelity(Cache.open(made), teacher=str(teacher), rows=6, temperatures=(1.0,))
    assert verify(made) == [] and set(result["attention_kl"]) == {"2", "4"}
    assert all(0 < value <= (2e-2 if "top" in settings else 1e-3) for value in result["attention_kl"].values())


def test_a_unit_that_is_made_again_is_the_same_file(teacher: Path, tmp_path: Path, cache: Path) -> None:
    targets = {"logits": LOGITS, "attention": {"kind": "maps", "layers": [2, 4]}}
    recipe = tiny_recipe(tmp_path, teacher=teacher, targets=targets)
    build_cache(recipe, units=1)
    build_cache(recipe)
    for path in cache.rglob("*.arrow"):
        assert (tmp_path / "cache" / path.relative_to(cache)).read_bytes() == path.read_bytes()


def test_maps_without_the_layer_file_that_says_how_far_they_see_are_refused(cache: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "copied"))
    sign(copied, lambda data: data["read_by"].pop("attention"))
    with pytest.raises(CacheDamaged, match="the manifest names no layer file"):
        Cache.open(copied).read_row("train", 0)


@pytest.mark.parametrize(
    ("attention", "sequence", "message"),
    [
        ({"heads": 3}, {}, r"targets.attention.heads is 3, but the teacher's 4 heads cannot be averaged .* divisor"),
        ({"heads": 8}, {}, r"targets.attention.heads is 8, but the teacher's 4 heads"),
        ({}, {"length": 8193}, r"at most 536870912 are possible; store fewer layers, .* or use kind: relations"),
        ({"top": 4}, {"length": 2**17}, r"the keys of 131072 tokens are more than 65535 apart; .* kind: relations"),
    ],
)  # fmt: skip
def test_maps_that_cannot_be_are_refused_before_anything_runs(
    tmp_path: Path, attention: dict[str, Any], sequence: dict[str, Any], message: str
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", layers=4, context=2**18)
    targets = {"attention": {"kind": "maps", "layers": [2, 4], **attention}}
    recipe = tiny_recipe(tmp_path / "job", teacher=teacher, targets=targets, sequence=sequence)
    with pytest.raises(RecipeError, match=message) as caught:
        make_plan(recipe)
    assert "\n" not in str(caught.value) and not (tmp_path / "job" / "cache").exists()


def test_the_longest_rows_that_fit_are_planned(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", layers=4, context=2**14)
    targets = {"attention": {"kind": "maps", "layers": [2, 4]}}
    recipe = tiny_recipe(tmp_path / "job", teacher=teacher, targets=targets, sequence={"length": 8192})
    assert make_plan(recipe).targets.attention.longest == 8192


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            {"kind": "maps", "values": True},
            "`targets.attention.values` is of kind: relations or kind: queries-keys",
        ),
        ({"top": 4}, "`targets.attention.top` is of kind: maps; leave it out, or choose that"),
        ({"kind": "queries-keys", "heads": 4}, "`targets.attention.heads` is of kind: maps"),
        ({"kind": "maps", "top": 0}, "top"),
    ],
)
def test_settings_of_other_kinds_are_refused(attention: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"cache": "c", "targets": {"attention": {"layers": [2], **attention}}}, origin="tests")


def test_longer_rows_share_a_shard_with_fewer_others() -> None:
    sizes = [AttentionMaps(layers=(1,), heads=9, longest=longest).token_bytes for longest in (512, 1024)]
    assert sizes[1] == pytest.approx(3050, rel=0.03) and sizes[0] == pytest.approx(sizes[1] / 2, rel=0.01)
    assert AttentionMaps(layers=(1,), heads=9, longest=1024, top=16).token_bytes == pytest.approx(210, rel=0.1)
