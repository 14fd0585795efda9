"""No room on the disk, and a disk that cannot be written to: one line each, and the same command goes on afterwards.

The disk is a small tmpfs in a mount namespace of the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from teachercache.cache import verify
from teachercache.precompute.capture.plan import make_plan

from builders import build_cache, sentences, tiny_recipe, tiny_teacher

ROOT = Path(__file__).parents[3]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not CAN_MOUNT, reason="this user may not mount a tmpfs in a namespace of its own")
# Copies what is in `saved` to a tmpfs in its place, runs the command there under each of the mount options, and copies it back.
SCRIPT = """
import json, os, shutil, subprocess, sys
from pathlib import Path
saved, recipe, *options = sys.argv[1:]
disk = Path(recipe).parent / "disk"
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
if Path(saved).exists():
    shutil.copytree(saved, disk / "cache")
ended = []
for option in options:
    if option.startswith("spare="):
        room = os.statvfs(disk)
        used = room.f_blocks - room.f_bfree
        option = f"rw,size={(used + int(option.removeprefix('spare='))) * room.f_bsize}"
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)
    command = [sys.executable, "-m", "teachercache", "precompute", recipe, "--json"]
    process = subprocess.run(command, capture_output=True, text=True)
    ended.append([process.returncode, process.stdout, process.stderr])
    left = [path.name for path in disk.rglob("*") if path.name.endswith(".tmp")]
    ended[-1].append(left)
shutil.rmtree(saved, ignore_errors=True)
if (disk / "cache").exists():
    shutil.copytree(disk / "cache", saved)
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher", layers=1)


def on_small_disks(
    folder: Path, teacher: Path, saved: Path, *options: str
) -> list[tuple[int, dict[str, Any], str, list[str]]]:
    """Exit status, what `--json` says, stderr and temporary files that are left, of the same command on a disk with each of
    these mount options in turn; `spare=4` is room for four more pages than are used."""
    recipe = tiny_recipe(folder, teacher=teacher, texts=sentences(60, seed=2))
    data = {**recipe.model_dump(mode="json", exclude_none=True), "cache": str(folder / "disk" / "cache")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline")}
    command = [*NAMESPACE, sys.executable, "-c", SCRIPT, str(saved), str(folder / "recipe.yaml"), *options]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [(status, json.loads(out), err, left) for status, out, err, left in json.loads(ended.stdout)]


def assert_no_room(status: int, told: dict[str, Any], err: str, left: list[str]) -> None:
    assert (status, told["exit_status"]) == (1, 1), err
    assert "No space left on device" in told["error"] and "run the same command again to go on" in told["error"]
    assert "Traceback" not in err and left == []


def test_a_job_that_finds_no_room_to_commit_goes_on_once_there_is_some(tmp_path, teacher):
    """All units are done; a disk that may not be written to is the user's mistake, with status 2."""
    recipe = tiny_recipe(tmp_path / "done", teacher=teacher, texts=sentences(60, seed=2))
    build_cache(recipe, units=len(make_plan(recipe).pending()))
    read_only, full, roomy = on_small_disks(tmp_path, teacher, Path(recipe.cache), "ro", "spare=1", "size=64m")
    assert read_only[0] == 2 and "Read-only file system" in read_only[1]["error"], read_only
    assert "Traceback" not in read_only[2]
    assert_no_room(*full)
    assert roomy[0] == 0, roomy[2]
    assert verify(Path(recipe.cache)) == []


def test_a_job_that_finds_no_room_to_stage_leaves_nothing(tmp_path, teacher):
    [full] = on_small_disks(tmp_path, teacher, tmp_path / "saved", "size=16k")
    assert_no_room(*full)


@pytest.mark.slow
def test_a_job_that_finds_no_room_while_it_captures_goes_on_once_there_is_some(tmp_path, teacher):
    """The corpus is staged, and one unit done; the next shards do not fit."""
    recipe = tiny_recipe(tmp_path / "begun", teacher=teacher, texts=sentences(60, seed=2))
    build_cache(recipe, units=1)
    full, roomy = on_small_disks(tmp_path, teacher, Path(recipe.cache), "spare=6", "size=64m")
    assert_no_room(*full)
    assert roomy[0] == 0 and "resuming: " in roomy[2], roomy[2]
    alone = build_cache(tiny_recipe(tmp_path / "alone", teacher=teacher, texts=sentences(60, seed=2)))
    assert (Path(recipe.cache) / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()
    assert verify(Path(recipe.cache)) == []
