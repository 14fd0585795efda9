"""A manifest that is lost or damaged: put back from a copy, or made again from the records of its job."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teachercache.cache import verify
from teachercache.cache.manifest.manifest import read_manifest
from teachercache.cache.repair import repair_manifest
from teachercache.errors import CacheDamaged, CacheError

from builders import build_cache, sentences, tiny_recipe, tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher", layers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return build_cache(tiny_recipe(tmp_path_factory.mktemp("made"), teacher=teacher, texts=sentences(20)))


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = pytest.mark.parametrize("damage", [Path.unlink, flipped], ids=["lost", "a flipped bit"])


def keep_copy(cache: Path) -> None:
    """As FORMAT.md has it."""
    kept = cache / "snapshots" / read_manifest(cache).fingerprint
    shutil.copytree(cache / "index", kept / "index")
    shutil.copy(cache / "manifest.json", kept)


@DAMAGES
def test_it_comes_back_from_a_copy(cache: Path, damage: Callable[[Path], None]) -> None:
    keep_copy(cache)
    before = (cache / "manifest.json").read_bytes()
    damage(cache / "manifest.json")
    shutil.rmtree(cache / "index")
    assert "manifest.json is again that of snapshots/" in repair_manifest(cache)
    assert (cache / "manifest.json").read_bytes() == before
    assert verify(cache) == []
    assert "nothing to repair" in repair_manifest(cache)


def test_a_copy_whose_shards_are_gone_is_not_taken(cache: Path) -> None:
    keep_copy(cache)
    (cache / "manifest.json").unlink()
    next((cache / "shards").iterdir()).unlink()
    with pytest.raises(CacheDamaged, match="1 shards and their index, but teacher.* stood in it alone"):
        repair_manifest(cache)
    assert not (cache / "manifest.json").exists()


@DAMAGES
def test_its_job_makes_it_again_while_its_records_are_there(
    tmp_path: Path, teacher: Path, made: Path, damage: Callable[[Path], None]
) -> None:
    """As after a kill between the manifest and the removal of what the job worked with."""
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=sentences(20))
    build_cache(recipe, units=2)
    shutil.copytree(Path(recipe.cache) / ".work", tmp_path / "work")
    cache = build_cache(recipe)
    shutil.copytree(tmp_path / "work", cache / ".work")
    damage(cache / "manifest.json")
    assert "run `teachercache precompute` with its recipe again" in repair_manifest(cache)
    build_cache(recipe)
    assert (cache / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()
    assert verify(cache) == []


def test_what_is_no_cache_is_not_repaired(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache at"):
        repair_manifest(tmp_path / "nowhere")
