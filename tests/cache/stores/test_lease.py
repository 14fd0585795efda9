"""One job at a time writes to a cache: real processes hold the lease, are stopped, killed, and started elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teachercache.cache.stores.lease import LeaseLost, leased
from teachercache.cache.stores.local import LocalStore
from teachercache.errors import JobFailed

HOLDER = """
import sys
from pathlib import Path
from teachercache.cache.stores.lease import leased
from teachercache.cache.stores.local import LocalStore
from teachercache.errors import JobFailed
try:
    with leased(LocalStore(Path(sys.argv[1])), job="test", beat=0.1, patience=2) as store:
        print("held", flush=True)
        for line in sys.stdin:
            store.put("shards/" + line.strip(), b"")
            print("written", flush=True)
except JobFailed as error:
    print(error, flush=True)
"""
# What stands for another machine: its own process ids and its own name.
ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--net"]


class Job:
    """A process that holds the lease of a folder, or says why not."""

    def __init__(self, folder: Path, *, elsewhere: bool = False) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*(ELSEWHERE if elsewhere else ()), sys.executable, "-c", HOLDER, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.said = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, name: str) -> str:
        """Have it write an object; what it says then."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self.line()

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.process.communicate("")


@pytest.fixture(scope="module")
def elsewhere() -> None:
    if subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make name spaces")


def claims(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(".work/lease/*.json"))]


def test_a_second_job_is_told_who_holds_it_also_by_another_path(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    first = Job(tmp_path / "cache")
    for path in ("cache", "link"):
        with pytest.raises(JobFailed) as caught, leased(LocalStore(tmp_path / path), job="test"):
            pass
        said = str(caught.value)
        assert f"another test (process {first.process.pid} on {os.uname().nodename}, since 20" in said
        assert said.endswith(f"wait for it or stop it (on {os.uname().nodename}: kill {first.process.pid})")
    assert first.write("a") == "written"
    first.end()
    assert list(LocalStore(tmp_path / "cache").list()) == ["shards/a"]
    assert not (tmp_path / "cache" / ".work").exists()


def test_a_killed_job_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.signal(signal.SIGKILL)
    first.process.wait()
    with leased(LocalStore(tmp_path), job="test", patience=10**6) as store:  # for ever, were it waited for
        store.put("shards/a", b"")
        assert len(claims(tmp_path)) == 2
    assert LocalStore(tmp_path).list() == {"shards/a": 0}


def test_a_stopped_job_of_this_machine_still_holds_it(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.signal(signal.SIGSTOP)
    with pytest.raises(JobFailed, match="is writing to"), leased(LocalStore(tmp_path), job="test", patience=0.1):
        pass
    first.signal(signal.SIGCONT)
    assert first.write("a") == "written"
    first.end()


def test_a_living_job_elsewhere_is_left_alone_and_a_dead_one_followed(tmp_path: Path, elsewhere: None) -> None:
    first, told = Job(tmp_path, elsewhere=True), list[str]()
    assert first.said == "held"
    for _ in range(2):
        with (
            pytest.raises(JobFailed, match="is writing to"),
            leased(LocalStore(tmp_path), job="test", patience=10.0, tell=told.append),
        ):
            pass
    assert "looking for 10 s whether it is alive" in told[0]
    first.signal(signal.SIGKILL)
    first.process.wait()
    with leased(LocalStore(tmp_path), job="test", patience=1.0):
        pass
    assert LocalStore(tmp_path).list() == {}


def test_a_stopped_job_elsewhere_that_wakes_up_writes_nothing_more(tmp_path: Path, elsewhere: None) -> None:
    first = Job(tmp_path, elsewhere=True)
    assert first.write("a") == "written"
    first.signal(signal.SIGSTOP)
    with leased(LocalStore(tmp_path), job="test", patience=1.0) as store:
        first.signal(signal.SIGCONT)
        store.put("shards/b", b"")
        said = first.write("c")
        assert "another test (process" in said and "has taken" in said and "writes nothing more" in said
        first.end()
        store.put("shards/d", b"")
    assert list(LocalStore(tmp_path).list()) == ["shards/a", "shards/b", "shards/d"]


def test_one_that_wakes_up_after_its_followers_have_ended_writes_nothing_either(
    tmp_path: Path, elsewhere: None
) -> None:
    """There is no later claim then, and its own is gone; a third job may have claimed its very epoch."""
    for third in (False, True):
        first = Job(tmp_path, elsewhere=True)
        first.signal(signal.SIGSTOP)
        with leased(LocalStore(tmp_path), job="test", patience=1.0):
            pass
        follower = Job(tmp_path) if third else None
        first.signal(signal.SIGCONT)
        assert "writes nothing more" in first.write("c")
        first.end()
        if follower is not None:
            assert follower.write("d") == "written"
            follower.end()
    assert list(LocalStore(tmp_path).list()) == ["shards/d"]


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_clocks_are_not_compared(tmp_path: Path, elsewhere: None, since: str) -> None:
    """Whatever a holder's clock says: one that beats is alive, and one that does not is dead."""
    first = Job(tmp_path, elsewhere=True)
    [claim] = tmp_path.glob(".work/lease/*.json")
    changed = {**json.loads(claim.read_text()), "since": since}
    first.signal(signal.SIGSTOP)
    claim.write_text(json.dumps(changed))
    with leased(LocalStore(tmp_path), job="test", patience=1.0):
        pass
    first.signal(signal.SIGKILL)
    first.process.wait()


def test_of_jobs_that_begin_at_the_same_time_one_holds_it(tmp_path: Path) -> None:
    dead = Job(tmp_path)
    dead.signal(signal.SIGKILL)
    dead.process.wait()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )
        for _ in range(4)
    ]  # fmt: skip
    said = [job.stdout.readline().strip() for job in jobs if job.stdout is not None]
    assert sorted(line == "held" for line in said) == [False, False, False, True]
    for job in jobs:
        job.communicate("")
    assert LocalStore(tmp_path).list() == {}


def test_a_lease_that_is_lost_is_said_by_each_verb_that_writes(tmp_path: Path) -> None:
    with leased(LocalStore(tmp_path), job="test") as store:
        store.put("shards/a", b"")
        for path in tmp_path.glob(".work/lease/*.json"):
            path.unlink()
        time.sleep(1.1)  # what one look holds for
        for write in (
            lambda: store.put("shards/b", b""),
            lambda: store.put_if_absent("shards/b", b""),
            lambda: store.delete("shards/a"),
            lambda: store.sweep(),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert store.list() == {"shards/a": 0} and store.get("shards/a") == b""
