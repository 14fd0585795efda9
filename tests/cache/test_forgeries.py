"""Forged caches with right digests: each ends in a line, within 10 s of processor time and 1.5 GB, and harms nothing.

Each is opened in two forks (forgery_server.py), by `verify --deep` and as training and alignment open it, under limits of
the kernel's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache.forgeries import FORGERIES, UNREAD

from builders import aligned, other_student, sentences, tiny_cache

SERVER = Path(__file__).with_name("forgery_server.py")
IN_CI = set(list(FORGERIES)[::20])
Opened = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    logits = {"kind": "head+sketch", "k": 4, "rank": 8, "step": 0.05, "calibration_positions": 64}
    cache = tiny_cache(folder, texts=sentences(10), targets={"logits": logits})
    aligned(cache, other_student(folder / "student"))
    return cache


@pytest.fixture(scope="module")
def opened(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Ask the server; it works in a folder of its own."""
    own = tmp_path_factory.mktemp("server")
    (own / "temporary").mkdir()
    paths = os.pathsep.join([str(SERVER.parents[1]), *sys.path])
    environment = {**os.environ, "TMPDIR": str(own / "temporary"), "HOME": str(own), "PYTHONPATH": paths}
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(made)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, cwd=own, env=environment,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None

    def ask(folder: Path) -> dict[str, Any]:
        assert server.stdin is not None and server.stdout is not None
        print(folder, file=server.stdin, flush=True)
        found = json.loads(server.stdout.readline())
        found["left"] = sorted(path.name for path in (own / "temporary").iterdir())
        for name in found["left"]:  # or it would count against every forgery after this one
            shutil.rmtree(own / "temporary" / name)
        return found

    yield ask
    server.stdin.close()
    server.wait(30)


def test_there_are_many() -> None:
    assert len(FORGERIES) >= 150 and len(IN_CI) >= 15


def test_a_whole_cache_is_read_within_the_limits(made: Path, opened: Opened) -> None:
    found = opened(made)
    assert found["verify"]["status"] == found["read"]["status"] == 0 and found["verify"]["problems"] == []
    assert found["verify"]["noted"] == found["read"]["noted"] == [] and found["left"] == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_CI else [pytest.mark.slow]) for n in FORGERIES])
def test_a_forgery_ends_in_a_line(made: Path, opened: Opened, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache", symlinks=True))
    FORGERIES[name](folder)
    before = _names(tmp_path)
    found = opened(folder)
    for way in ("verify", "read"):
        result = found[way]
        assert "ended" not in result, f"{way} was ended by {result}"
        assert result["noted"] == [], f"{way} did {result['noted']}"
        assert result["seconds"] < 10 and result["peak"] - found["own"] < 1.5e9
    assert found["left"] == [], "temporary files are gone"
    verified, read = found["verify"], found["read"]
    assert verified["status"] in (0, 1, 2) and not verified.get("error", "").startswith("unexpected")
    if name in UNREAD:
        assert read["status"] == 0 and verified["problems"]
        return
    message = read.get("error", "")
    assert read["status"] in (1, 2) and message and not message.startswith("unexpected"), read
    assert "\n" not in message and len(message) < 2000
    assert _names(tmp_path) == before


def _names(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))
