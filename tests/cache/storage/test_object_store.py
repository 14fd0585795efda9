"""A cache at a URL: the same rows as from its folder, whatever the network, the disk and other processes do.

The server is a real one, spoken to over HTTP through a proxy that breaks things (s3_server.py); processes are killed with
SIGKILL, bytes are flipped on disk and in the bucket, and the full disk is a mounted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachercache.cache import Cache, verify
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.inspection import describe_row
from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.cache.storage.local_copies import LocalCopies
from teachercache.cache.storage.source import RemoteFiles
from teachercache.cache.stores.object_store import ObjectStore
from teachercache.errors import CacheDamaged, CacheError, JobFailed

from builders import part, sentences, tiny_cache
from s3_server import Server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 12 rows."""
    return tiny_cache(tmp_path_factory.mktemp("made"), texts=sentences(60), precompute={"unit_rows": 12})


@pytest.fixture(scope="module")
def first(made: Path) -> str:
    """The first shard's file."""
    return part(made, 0).relative_to(made).as_posix()


@pytest.fixture(scope="module")
def uploaded(made: Path, s3_process: Server) -> str:
    return s3_process.upload(made, "bucket/caches/one")


@pytest.fixture
def broken(made: Path, s3: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """A copy of the cache in the bucket, for tests that damage it; its place, `bucket/prefix`."""
    place = f"bucket/{request.node.name}"
    s3.upload(made, place)
    s3.forget()
    yield place


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def impatient(url: str, local: Path, *, limit: int = 10**9, attempts: int = 3) -> Cache:
    """`Cache.open` with short waits between retries."""
    source = RemoteFiles(ObjectStore(url, attempts=attempts, first_wait=0.01), LocalCopies(local, limit=limit))
    return Cache(source, source.manifest())


def copies(local: Path) -> list[Path]:
    """Everything in the folder that counts: whole copies and parts."""
    return [path for path in local.iterdir() if path.is_file() and path.name != ".lock"]


def first_rows(cache: Cache) -> list[int]:
    """The index of the first train row of every shard."""
    return [int(end) for end in np.cumsum([0, *(s.rows - s.held_out_rows for s in cache.manifest.shards)])[:-1]]


def assert_same_rows(ours: Cache, theirs: Cache) -> None:
    for split in ("train", "held-out"):
        assert ours.rows_of(split) == theirs.rows_of(split) > 0
        for index in range(theirs.rows_of(split)):
            a, b = ours.read_row(split, index), theirs.read_row(split, index)
            assert a.row.row_id == b.row.row_id
            np.testing.assert_array_equal(a.row.input_ids_S, b.row.input_ids_S)
            for name, values in b.targets.items():
                np.testing.assert_array_equal(a.targets[name], values)


# --------------------------------------------------------------------------- the same cache


def test_rows_are_those_of_the_folder_and_every_file_is_fetched_once(
    made: Path, uploaded: str, s3: Server, local: Path
) -> None:
    cache = Cache.open(uploaded, local=local)
    assert cache.name == "s3://bucket/caches/one"
    assert_same_rows(cache, Cache.open(made))
    again = Cache.open(uploaded, local=local)
    assert_same_rows(pickle.loads(pickle.dumps(again)), Cache.open(made))
    assert [s3.downloads(shard.file) for shard in cache.manifest.shards] == [1] * 5
    assert s3.downloads(MANIFEST) == 2  # at every opening: it may have changed
    with pytest.raises(CacheError, match="is in an object store"):
        _ = cache.folder


def test_the_teachers_files_have_their_names_and_nobody_elses_hands(
    made: Path, uploaded: str, s3: Server, local: Path
) -> None:
    for _ in range(2):
        with Cache.open(uploaded, local=local).teacher_folder() as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            listed = {path.name for path in (made / "teacher").iterdir()}
            assert {path.name for path in folder.iterdir()} == listed
            for name in listed:
                assert (folder / name).read_bytes() == (made / "teacher" / name).read_bytes()
        assert not folder.exists()
    assert s3.downloads("teacher/tokenizer.json") == 1


def test_a_cache_with_a_basis(tmp_path: Path, s3: Server, local: Path) -> None:
    logits = {"kind": "head+sketch", "k": 4, "rank": 8, "calibration_positions": 64}
    folder = tiny_cache(tmp_path / "sketched", targets={"logits": logits})
    cache, theirs = Cache.open(s3.upload(folder, "bucket/sketched"), local=local), Cache.open(folder)
    decoded, expected = (each.kind.decoded(each.read_row("train", 3).targets) for each in (cache, theirs))
    for name, values in expected.items():
        np.testing.assert_array_equal(decoded[name], values)
    dense = [each.kind.softened(decoded, 2.0).dense() for each in (cache, theirs)]
    np.testing.assert_array_equal(*dense)


def test_caches_share_what_they_have_in_common(broken: str, s3: Server, uploaded: str, local: Path, first: str) -> None:
    for url in (uploaded, s3.url(broken)):
        Cache.open(url, local=local).read_row("train", 0)
    assert s3.downloads(first) == 1


def test_a_folder_may_be_a_url(made: Path, local: Path) -> None:
    assert_same_rows(Cache.open(made.as_uri(), local=local), Cache.open(made))


@pytest.mark.parametrize("url", ["https://example.org/cache", "s3://", "s4://bucket/x", "s3://bucket/x?nonsense=1"])
def test_a_url_that_cannot_be_used(url: str, local: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot be used: .*; write e.g. s3://BUCKET/PREFIX"):
        Cache.open(url, local=local)


# --------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "fault", [{"kind": "status", "status": 500}, {"kind": "status", "status": 503}, {"kind": "cut"}]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_passes_is_retried(
    made: Path, uploaded: str, s3: Server, local: Path, fault: dict[str, Any], method: str, first: str
) -> None:
    s3.break_next(match=first, times=2, after=1000, method=method, **fault)
    cut_head = method == "HEAD" and fault["kind"] == "cut"  # it has no body that could be cut
    assert_same_rows(impatient(uploaded, local), Cache.open(made))
    asked = [entry for entry in s3.log() if first in entry["path"] and entry["method"] == method]
    assert len(asked) == (1 if cut_head else 3)


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 500}, {"kind": "cut", "after": 1000}])
def test_what_does_not_pass_ends_in_one_line(
    uploaded: str, s3: Server, local: Path, fault: dict[str, Any], first: str
) -> None:
    s3.break_next(match=first, times=-1, **fault)
    cache = impatient(uploaded, local)
    with pytest.raises(JobFailed) as caught:
        cache.read_row("train", 0)
    assert s3.downloads(first) == 3
    message = str(caught.value)
    assert message.startswith(f"s3://bucket/caches/one/{first} could not be read in 3 attempts: Generic S3 error: ")
    assert message.endswith("run the same command again") and "\n" not in message
    assert not copies(local), "nothing half fetched stays"
    s3.forget()
    assert cache.read_row("train", 0).row.positions, "the same cache goes on when the server is back"


def test_nobody_listens(local: Path) -> None:
    with pytest.raises(
        JobFailed, match=r"s3://bucket/x/manifest.json could not be read in 3 attempts: .*cannot connect"
    ):
        impatient("s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:1", local)


@pytest.mark.slow
def test_a_connection_that_stalls_is_given_up(made: Path, uploaded: str, s3: Server, local: Path, first: str) -> None:
    s3.break_next(match=first, kind="stall", after=1000, seconds=60)
    assert_same_rows(impatient(uploaded, local), Cache.open(made))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_denied_access_is_said_at_once(uploaded: str, s3: Server, local: Path, method: str, first: str) -> None:
    s3.break_next(match=first, times=-1, kind="status", status=403, method=method)
    with pytest.raises(CacheError, match=rf"^s3://bucket/caches/one/{first}: access is denied .*AWS_ACCESS_KEY_ID"):
        impatient(uploaded, local).read_row("train", 0)
    assert len([entry for entry in s3.log() if first in entry["path"] and entry["method"] == method]) == 1


def test_no_cache_there(s3: Server, uploaded: str, local: Path) -> None:
    for place in ("bucket/nothing", "no-such-bucket/x"):
        with pytest.raises(CacheError, match=rf"^there is no cache at s3://{place}: it has no manifest.json"):
            Cache.open(s3.url(place), local=local)


# --------------------------------------------------------------------------- damage in the bucket


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


def test_a_damaged_object_is_refused_and_not_kept(broken: str, made: Path, s3: Server, local: Path, first: str) -> None:
    whole = (made / first).read_bytes()
    s3.replace(f"{broken}/{first}", flipped(whole, len(whole) // 2))
    cache = impatient(s3.url(broken), local)
    with pytest.raises(CacheDamaged, match=rf"^s3://{broken}/{first} differs from its sha256 .*; upload it again"):
        cache.read_row("train", 0)
    assert not copies(local) and s3.downloads(first) == 2
    s3.replace(f"{broken}/{first}", whole)
    assert_same_rows(cache, Cache.open(made))


def test_a_shortened_and_a_missing_object(broken: str, made: Path, s3: Server, local: Path, first: str) -> None:
    whole = (made / first).read_bytes()
    s3.replace(f"{broken}/{first}", whole[:-100])
    cache = impatient(s3.url(broken), local)
    with pytest.raises(CacheDamaged, match=rf"{first} holds {len(whole) - 100} bytes, the manifest says {len(whole)}"):
        cache.read_row("train", 0)
    s3.delete(f"{broken}/{first}")
    with pytest.raises(CacheDamaged, match=rf"{first} is missing; upload it"):
        cache.read_row("train", 0)
    assert s3.downloads(first) == 0 and not copies(local)


def test_a_manifest_that_was_edited_or_chooses_file_names(broken: str, made: Path, s3: Server, local: Path) -> None:
    data = json.loads((made / MANIFEST).read_text())
    s3.replace(f"{broken}/{MANIFEST}", json.dumps({**data, "created_by": "somebody else"}).encode())
    with pytest.raises(CacheDamaged, match=rf"^s3://{broken}/manifest.json cannot be trusted: .*digest does not match"):
        Cache.open(s3.url(broken), local=local)
    data["files"][0]["sha256"] = "../../evil"
    data["digest"] = fingerprint_of({key: value for key, value in data.items() if key not in ("format", "digest")})
    s3.replace(f"{broken}/{MANIFEST}", json.dumps(data).encode())
    with pytest.raises(CacheDamaged, match=r"a sha256 of a file is none"):
        Cache.open(s3.url(broken), local=local).read_row("train", 0)
    assert not copies(local)


def test_verify_looks_at_every_object(broken: str, made: Path, s3: Server) -> None:
    url = s3.url(broken)
    assert verify(url) == verify(url, quick=True) == []
    shards = sorted(path.relative_to(made).as_posix() for path in (made / "shards").iterdir())
    s3.replace(f"{broken}/{shards[0]}", flipped((made / shards[0]).read_bytes(), 99))
    s3.replace(f"{broken}/{shards[1]}", b"short")
    s3.delete(f"{broken}/{shards[2]}")
    s3.replace(f"{broken}/run_me.py", b"?")
    reasons = {problem.file: problem.reason for problem in verify(url)}
    assert "sha256 differs" in reasons.pop(shards[0])
    assert "holds 5 bytes" in reasons[shards[1]] and reasons[shards[2]] == "it is missing"
    assert reasons["run_me.py"] == "the manifest does not list it" and len(reasons) == 3
    s3.forget()
    assert {problem.file for problem in verify(url, quick=True)} == set(reasons)
    assert s3.downloads("shards/") == 0


# --------------------------------------------------------------------------- damage on the local disk


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_copy_is_fetched_again(
    made: Path, uploaded: str, s3: Server, local: Path, damage: str, first: str
) -> None:
    cache = Cache.open(uploaded, local=local)
    cache.read_row("train", 0)
    copy = local / cache.manifest.shards[0].rows_file.sha256
    whole = copy.read_bytes()
    assert whole == (made / first).read_bytes()
    copy.write_bytes({"flip": flipped(whole, 321), "truncate": whole[:-1], "empty": b""}[damage])
    assert_same_rows(Cache.open(uploaded, local=local), Cache.open(made))
    assert copy.read_bytes() == whole and s3.downloads(first) == 2


@pytest.mark.parametrize("how", ["replaced", "a link", "written to", "a pipe"])
def test_what_takes_a_copys_place_after_its_check_is_not_read(
    uploaded: str, s3: Server, local: Path, how: str, first: str
) -> None:
    """By the same reader: what was hashed is what is read."""
    source = Cache.open(uploaded, local=local).source
    info = Cache.open(uploaded, local=local).manifest.shards[0].rows_file
    with source.opened(info) as stream:
        whole = stream.read()
    copy, evil = local / info.sha256, flipped(whole, 321)
    aside = local / "aside"
    aside.write_bytes(evil)
    if how == "written to":
        time.sleep(0.02)  # a tick of the kernel's clock
        copy.write_bytes(evil)
    elif how == "replaced":
        aside.replace(copy)
    else:
        copy.unlink()
        os.mkfifo(copy) if how == "a pipe" else copy.symlink_to(aside)
    with source.opened(info) as stream:
        assert stream.read() == whole
    assert copy.read_bytes() == whole and s3.downloads(first) == 2


def test_what_a_killed_process_left_is_cleaned_away(uploaded: str, s3: Server, local: Path) -> None:
    local.mkdir()
    stale, ours = local / f"{'0' * 64}.part", local / "somebody's notes.part"
    stale.write_bytes(b"half a shard")
    ours.write_text("not of this cache: left alone")
    Cache.open(uploaded, local=local).read_row("train", 0)
    assert not stale.exists() and ours.exists()


def test_a_folder_that_cannot_be_written_to(uploaded: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"local copies cannot be kept in .*; set stream.local"):
        Cache.open(uploaded, local=tmp_path / "file" / "copies")


# --------------------------------------------------------------------------- bounds


def largest(cache: Cache) -> int:
    return max(shard.bytes for shard in cache.manifest.shards)


def test_the_longest_unused_copies_go_first_and_the_limit_holds(
    made: Path, uploaded: str, s3: Server, local: Path
) -> None:
    limit = int(2.5 * largest(Cache.open(made)))
    cache, order = impatient(uploaded, local, limit=limit), [0, 1, 0, 2, 3, 4, 3]
    starts = first_rows(cache)
    for shard in order:
        again = pickle.loads(pickle.dumps(cache))  # a reader without open shards
        again.read_row("train", starts[shard])
        assert sum(path.stat().st_size for path in copies(local)) <= limit
        if shard == 2:
            kept = {path.name for path in copies(local)}
            assert kept == {cache.manifest.shards[0].rows_file.sha256, cache.manifest.shards[2].rows_file.sha256}
    assert [s3.downloads(shard.file) for shard in cache.manifest.shards] == [1, 1, 1, 1, 1]


def test_an_evicted_shard_stays_readable_for_those_that_have_it_open(made: Path, uploaded: str, local: Path) -> None:
    cache = impatient(uploaded, local, limit=1)  # no shard fits: there is one at a time
    for index in first_rows(cache):
        cache.read_row("train", index)
        assert len(copies(local)) == 1
    shard = cache.manifest.shards[0]
    assert not (local / shard.rows_file.sha256).exists()
    assert_same_rows(cache, Cache.open(made))


READER = """
import sys, json
from pathlib import Path
from teachercache.cache import Cache
url, local, limit = sys.argv[1:]
cache = Cache.open(url, local=Path(local), local_bytes=int(limit))
print("open", flush=True)
sys.stdin.readline()
for _ in range(2):
    rows = [cache.read_row("train", index).row.row_id for index in range(cache.rows_of("train"))]
print(json.dumps(rows))
"""


def reader(url: str, local: Path, *, limit: int = 10**9) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READER, url, str(local), str(limit)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def rows_from(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(out)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def expected_rows(made: Path) -> list[str]:
    cache = Cache.open(made)
    return [cache.read_row("train", index).row.row_id for index in range(cache.rows_of("train"))]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_download_a_shard(
    made: Path, uploaded: str, s3: Server, local: Path, processes: int
) -> None:
    readers = [reader(uploaded, local) for _ in range(processes)]
    for each in readers:
        go(each)
    assert [rows_from(each) for each in readers] == [expected_rows(made)] * processes
    assert [s3.downloads(shard.file) for shard in Cache.open(made).manifest.shards] == [1] * 5


def test_the_limit_holds_while_processes_fetch_at_once(made: Path, uploaded: str, local: Path) -> None:
    biggest = largest(Cache.open(made))
    readers = [reader(uploaded, local, limit=2 * biggest) for _ in range(3)]
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError):
                most = max(most, sum(path.stat().st_size for path in copies(local)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for each in readers:
        go(each)
    try:
        assert [rows_from(each) for each in readers] == [expected_rows(made)] * 3
    finally:
        ended.set()
        watcher.join()
    # A folder is not listed at one moment: what was evicted while it was being listed may count.
    assert biggest < most <= 3 * biggest


def test_a_process_killed_in_mid_download_leaves_nobody_waiting(
    made: Path, uploaded: str, s3: Server, local: Path, first: str
) -> None:
    s3.break_next(match=first, kind="stall", after=2000, seconds=120)
    killed, waiting = reader(uploaded, local), reader(uploaded, local)
    part = local / f"{Cache.open(made).manifest.shards[0].rows_file.sha256}.part"
    go(killed)
    while not s3.downloads(first):
        time.sleep(0.01)
    go(waiting)
    while not _waits_for_a_lock(waiting.pid):
        assert waiting.poll() is None
        time.sleep(0.01)
    assert part.exists() and s3.downloads(first) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert rows_from(waiting) == expected_rows(made)
    assert s3.downloads(first) == 2 and not part.exists()
    assert all(path.suffix == "" for path in copies(local))


def _waits_for_a_lock(pid: int) -> bool:
    return "flock" in Path(f"/proc/{pid}/wchan").read_text() or any(
        "->" in line and line.split()[5] == str(pid) for line in Path("/proc/locks").read_text().splitlines()
    )


# --------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A file system that holds three shards and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = 3 * largest(Cache.open(made)) // 4096 * 4096 + 16 * 4096
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_evicts_before_it_fails(made: Path, uploaded: str, small_disk: Path) -> None:
    cache = impatient(uploaded, small_disk / "copies")
    for index in first_rows(cache):
        pickle.loads(pickle.dumps(cache)).read_row("train", index)
    assert 0 < len(copies(small_disk / "copies")) < 5


def test_a_disk_that_others_have_filled_ends_in_one_line(made: Path, uploaded: str, small_disk: Path) -> None:
    cache = impatient(uploaded, small_disk / "copies")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    with pytest.raises(JobFailed) as caught:
        cache.read_row("train", 0)
    message = str(caught.value)
    assert "its disk is full" in message and str(small_disk) in message and "stream.local" in message
    assert "\n" not in message and not copies(small_disk / "copies")
    (small_disk / "filler").unlink()
    assert cache.read_row("train", 0).row.positions


# --------------------------------------------------------------------------- fetching ahead


def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")


def test_what_was_asked_for_is_there_before_it_is_read(made: Path, uploaded: str, s3: Server, local: Path) -> None:
    cache = Cache.open(uploaded, local=local)
    cache.prefetch([3, 1])
    wait_until(
        lambda: {path.name for path in copies(local)} == {cache.manifest.shards[n].rows_file.sha256 for n in (1, 3)}
    )
    before = s3.downloads("shards/")
    for number in (1, 3):
        cache.read_row("train", first_rows(cache)[number])
    assert before == s3.downloads("shards/") == 2
    assert_same_rows(cache, Cache.open(made))
    Cache.open(made).prefetch([1])  # of a folder: nothing to do


def test_errors_of_fetching_ahead_come_when_the_file_is_read(
    uploaded: str, s3: Server, local: Path, first: str
) -> None:
    s3.break_next(match=first, times=-1, kind="status", status=403)
    cache = Cache.open(uploaded, local=local)
    cache.prefetch([0, 1])
    wait_until(lambda: copies(local) and copies(local)[0].name == cache.manifest.shards[1].rows_file.sha256)
    with pytest.raises(CacheError, match="access is denied"):
        cache.read_row("train", 0)


def test_fetching_ahead_takes_no_more_than_half_of_the_room(uploaded: str, s3: Server, local: Path) -> None:
    cache = impatient(uploaded, local, limit=1)
    cache.prefetch(range(5))
    cache = impatient(uploaded, local, limit=int(4.5 * largest(cache)))
    cache.prefetch(range(5))
    wait_until(lambda: len(copies(local)) == 2)
    cache.read_row("train", first_rows(cache)[4])
    assert s3.downloads("shards/") == 3


EXIT = """
import sys
from pathlib import Path
from teachercache.cache import Cache
cache = Cache.open(sys.argv[1], local=Path(sys.argv[2]))
cache.prefetch(range(5))
"""


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_process_ends_in_good_order_while_it_fetches(uploaded: str, s3: Server, local: Path, seconds: int) -> None:
    s3.break_next(match="shards/", times=-1, kind="stall", after=100, seconds=seconds)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", EXIT, uploaded, str(local)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------- the command line


def _teachercache(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(home)}
    command = [sys.executable, "-m", "teachercache", *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_inspect_and_verify_take_a_url(made: Path, uploaded: str, tmp_path: Path) -> None:
    inspected = _teachercache("inspect", uploaded, "--row", "train:0", home=tmp_path)
    assert json.loads(inspected.stdout) == describe_row(Cache.open(made), "train:0")
    assert (tmp_path / ".cache/teachercache/shards" / Cache.open(made).manifest.shards[0].rows_file.sha256).is_file()
    shutil.rmtree(tmp_path / ".cache")
    verified = _teachercache("verify", uploaded, home=tmp_path)
    found = {"ok": True, "cache": uploaded, "errors": [], "quarantined": 0, "windows_quarantined": 0}
    found |= {"checked": "every byte", "lost_windows": []}
    assert json.loads(verified.stdout) == found
    assert not (tmp_path / ".cache").exists()
