"""Caches that earlier versions wrote are read as on the day when they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cache.golden_caches import CHAT, CHATS, EXPECTED, GOLDEN, RECIPES, reading
from teachercache.cache import Cache, verify

VERSIONS = sorted(path.name for path in GOLDEN.iterdir())
NAMES = {version: sorted(json.loads((GOLDEN / version / EXPECTED).read_text())) for version in VERSIONS}
WHOLE = [(version, name) for version in VERSIONS for name in NAMES[version]]


def test_no_golden_cache_is_left_out() -> None:
    assert {version: set(names) - {CHAT} for version, names in NAMES.items()} == {key: set(RECIPES) for key in VERSIONS}
    assert CHAT in NAMES["v2"]


def expected(version: str, name: str) -> dict[str, object]:
    return json.loads((GOLDEN / version / EXPECTED).read_text())[name]


@pytest.mark.parametrize(("version", "name"), WHOLE)
def test_reading_gives_what_it_gave_when_the_cache_was_made(version: str, name: str) -> None:
    found, wanted = reading(Cache.open(GOLDEN / version / name)), expected(version, name)
    assert found.pop("sums") == pytest.approx(wanted.pop("sums"), rel=1e-5)  # floats, of other machines' libraries too
    assert found == wanted  # the order of training among it: a run that is under way goes on in it


@pytest.mark.parametrize(("version", "name"), WHOLE)
def test_verify_holds_it_against_its_digests(version: str, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / version / name, tmp_path / "cache"))
    assert verify(folder) == verify(folder, quick=True) == []
    for info in Cache.open(folder).manifest.shards[-1:]:
        path = folder / info.file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert [problem.file for problem in verify(folder)] == [info.file]


def test_a_cache_of_conversations_says_where_messages_stand() -> None:
    cache = Cache.open(GOLDEN / "v2" / CHAT)
    segments = [
        segment for index in range(cache.rows_of("train")) for segment in cache.read_row("train", index).row.segments
    ]
    said = [
        [part.role, segment.text.encode()[part.start : part.end].decode()]
        for segment in segments
        for part in segment.contents
    ]
    assert {len(segment.contents) for segment in segments} == {4}
    wanted = {(message["role"], message["content"].strip()) for messages in CHATS for message in messages}
    assert {tuple(each) for each in said} <= wanted and ("assistant", "sat on a mat, café \U0001f642") in map(
        tuple, said
    )
    assert cache.manifest.settings["tokenizer"]["chat_template"]
