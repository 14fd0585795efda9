"""Names of files in a manifest: each file has one, which leads below the cache's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cache.forgery import sign
from cache.golden_caches import GOLDEN
from teachercache.cache import Cache, verify
from teachercache.cache.files.entries import check_inside
from teachercache.errors import CacheDamaged

ODD = [
    "teacher/config.json\0",
    "a//b",
    "./a",
    "a/./b",
    "a/../b",
    "../a",
    "/a",
    "a/",
    "a\\b",
    "",
    ".",
    "a\nb",
    "a\u202eb",
]


@pytest.mark.parametrize("name", [*ODD, None, 3, ["a"]])
def test_names_that_are_no_plain_paths_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="it names ") as caught:
        check_inside(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a", "a/b-c.d", ".a", "a/..b", "a b/ü", "teacher/additional_chat_templates/x.jinja"])
def test_plain_names_are_taken(name: str) -> None:
    check_inside(name)


@pytest.mark.parametrize("name", ODD[:5])
def test_a_manifest_with_such_a_name_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "v2" / "top-k", tmp_path / "cache"))
    sign(folder, lambda data: data["files"][0].update(file=name))
    with pytest.raises(CacheDamaged, match="it names") as caught:
        Cache.open(folder)
    assert "\n" not in str(caught.value)
    assert [problem.file for problem in verify(folder)] == ["manifest.json"]
