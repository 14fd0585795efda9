"""Files appear whole or not at all; one job at a time writes to a folder, and nothing of the lock stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PosixPath
from typing import Any

import pytest

import teachercache
from teachercache.errors import JobFailed
from teachercache.files import locked, same_imports, write_whole

HOLDER = """
import sys
from pathlib import Path
from teachercache.files import locked
with locked(Path(sys.argv[1]) / ".lock", job="", folder=Path()):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another job, which holds the lock until its stdin ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_lock_on_a_file_that_its_last_holder_has_removed_is_none(tmp_path: Path) -> None:
    """One job ends, and another begins, between a third one's opening of the file and its locking."""
    jobs = [holder(tmp_path)]

    class OvertakenPath(PosixPath):
        def open(self, *args: Any, **options: Any) -> Any:
            stream = super().open(*args, **options)
            if len(jobs) == 1:
                jobs[0].communicate("")
                jobs.append(holder(tmp_path))
            return stream

    with pytest.raises(JobFailed), locked(OvertakenPath(tmp_path / ".lock"), job="test", folder=tmp_path):
        pass
    assert (tmp_path / ".lock").is_file()
    jobs[1].communicate("")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path: Path) -> None:
    job = holder(tmp_path)
    lock = locked(tmp_path / ".lock", job="test", folder=tmp_path)
    with pytest.raises(JobFailed, match="another test is writing to"), lock:
        pass
    job.kill()
    job.communicate()
    assert (tmp_path / ".lock").is_file()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock", job="test", folder=tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_file_reaches_the_disk_before_its_name_and_then_the_name_does(tmp_path: Path) -> None:
    called = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function in (os.fsync, os.replace):
            called.append(function)

    sys.setprofile(note)
    try:
        write_whole(tmp_path / "record.json", "{}")
    finally:
        sys.setprofile(None)
    assert called == [os.fsync, os.replace, os.fsync]
    assert (tmp_path / "record.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_what_killed_writers_left_of_a_file_goes_with_the_next_write_of_it(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / ".record.json.tmp").symlink_to(tmp_path / "outside")
    (tmp_path / f".record.json.{'0' * 32}.tmp").write_text("half")
    (tmp_path / ".other.json.tmp").write_text("another file's")
    write_whole(tmp_path / "record.json", "{}")
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "record.json").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"outside", ".other.json.tmp", "record.json"}


WRITER = """
import sys
from pathlib import Path
from teachercache.files import write_whole
for number in range(200):
    write_whole(Path(sys.argv[1]) / "record.json", sys.argv[2] * 10_000, durable=sys.argv[3] == "durable")
"""


@pytest.mark.parametrize("durable", ["durable", "fast"])
def test_of_two_writers_of_a_file_one_wins_and_none_fails(tmp_path: Path, durable: str) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), letter, durable]) for letter in "ab"]
    read = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "record.json").exists():
            read.add((tmp_path / "record.json").read_text())
    assert [writer.wait() for writer in writers] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"record.json"}
    assert read | {(tmp_path / "record.json").read_text()} <= {"a" * 10_000, "b" * 10_000}


def test_a_process_of_our_own_finds_this_package_where_none_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import teachercache; print(teachercache.__file__)"  # without site-packages, and from elsewhere
    found = subprocess.check_output([sys.executable, "-S", "-c", code], env=same_imports(), cwd=tmp_path, text=True)
    assert Path(found.strip()).samefile(teachercache.__file__)
