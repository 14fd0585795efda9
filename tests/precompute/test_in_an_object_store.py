"""Jobs that write into an object store: the very files that they write into a folder, whatever breaks meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from teachercache.cache import Cache, verify
from teachercache.config import Recipe
from teachercache.precompute.align.job import run_align
from teachercache.precompute.capture.job import run_precompute
from teachercache.precompute.engine.cluster import connected

from builders import build_cache, other_student, sentences, tiny_recipe, tiny_teacher
from s3_server import Server

SKETCH = {"logits": {"kind": "head+sketch", "k": 6, "rank": 16, "step": 0.1, "calibration_positions": 400}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


@pytest.fixture(scope="module", autouse=True)
def bucket(s3_process: Server) -> None:
    s3_process.make_bucket("jobs")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    return [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]


def test_a_cache_and_its_alignment_in_a_store_are_those_in_a_folder(
    tmp_path: Path, s3: Server, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storms, cut uploads and answers that are lost fall on every kind of object that is written."""
    monkeypatch.chdir(tmp_path)  # where the log of a cache in a store goes
    texts, student = [*sentences(40), ""], str(other_student(tmp_path / "student"))
    here = tiny_recipe(tmp_path, teacher=teacher, texts=texts, targets=SKETCH)
    there = here.model_copy(update={"cache": s3.url("jobs/one")})
    for match in (
        "units/",
        "teacher/",
        "plan.json",
        "shards/",
        "quarantine/",
        "done/",
        "index/",
        "manifest.json",
        "ID",
    ):
        for fault in ({"kind": "status", "status": 503}, {"kind": "cut upload", "after": 100}, {"kind": "no answer"}):
            s3.break_next(match=match, method="PUT", **fault)  # type: ignore[arg-type]
    console = Console(stderr=True, quiet=True)
    with connected(here.precompute):
        for recipe in (here, there):
            made = run_precompute(recipe, console=console)
            assert made["cache"] == str(recipe.cache) and made["quarantined"] == 1
            aligned = run_align(recipe.cache, student=student, console=console)
            assert aligned["rows"] == made["rows"]
            assert run_precompute(recipe, console=console)["positions_computed"] == 0
    assert differing(s3.objects("jobs/one"), files(tmp_path / "cache")) == []
    assert s3.unfinished_uploads("jobs") == []
    assert verify(str(there.cache)) == verify(here.cache) == []
    read = Cache.open(str(there.cache), local=tmp_path / "copies").read_row("train", 0)
    assert read.row.row_id == Cache.open(tmp_path / "cache").read_row("train", 0).row.row_id


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "teachercache", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=cwd, start_new_session=True,
    )  # fmt: skip


def test_a_killed_job_resumes_in_the_store(tmp_path: Path, s3: Server, teacher: Path) -> None:
    settings: dict[str, Any] = {"precompute": {"unit_rows": 6, "positions_per_batch": 64}}
    here: Recipe = tiny_recipe(tmp_path, teacher=teacher, texts=sentences(60, seed=4), **settings)
    there = here.model_copy(update={"cache": s3.url("jobs/killed")})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(there.model_dump(mode="json", exclude_none=True)))
    job, deadline = command("precompute", str(path), "--json", cwd=tmp_path), time.time() + 600
    while not _done(s3) and time.time() < deadline and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    done = _done(s3)
    assert done and "manifest.json" not in s3.names("jobs/killed"), "killed too late to show anything"
    again = command("precompute", str(path), "--json", cwd=tmp_path)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "of 10 units are done" in err
    build_cache(here)
    assert differing(s3.objects("jobs/killed"), files(tmp_path / "cache")) == []


def _done(s3: Server) -> int:
    return sum(name.startswith(".work/done/") for name in s3.names("jobs/killed"))
