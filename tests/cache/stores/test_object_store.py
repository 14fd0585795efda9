"""An object store keeps the word of `Store` over HTTP, whatever the network and other writers do.

The server is a real one behind a proxy that breaks things (s3_server.py); writers are processes, some killed with SIGKILL.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from teachercache.cache.stores.object_store import ObjectStore
from teachercache.errors import CacheError, JobFailed

from s3_server import Server


@pytest.fixture(scope="module", autouse=True)
def bucket(s3_process: Server) -> None:
    s3_process.make_bucket("stores")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A prefix of the test's own."""
    return f"stores/{request.node.name.partition('[')[0]}"


@pytest.fixture
def store(s3: Server, place: str) -> Iterator[ObjectStore]:
    """Through the proxy, with short waits."""
    store = ObjectStore(s3.url(place), first_wait=0.01)
    store.delete(*store.list())
    s3.forget()
    yield store


def puts(s3: Server) -> int:
    return sum(entry["method"] == "PUT" for entry in s3.log())


def test_an_object_is_what_was_put_last(store: ObjectStore, s3: Server, place: str) -> None:
    store.put("done/00000.json", b"first")
    store.put("done/00000.json", memoryview(b"other"))
    store.put("done/00000.json", pa.py_buffer(b"second"))
    assert pickle.loads(pickle.dumps(store)).get("done/00000.json") == b"second"
    assert s3.objects(place) == {"done/00000.json": b"second"}
    with pytest.raises(FileNotFoundError):
        store.get("done/00001.json")


def test_an_object_that_is_there_stays(store: ObjectStore) -> None:
    assert store.put_if_absent("plan.json", b"ours")
    assert not store.put_if_absent("plan.json", b"theirs")
    assert not store.put_if_absent("plan.json", b"ours")
    assert store.get("plan.json") == b"ours"


def test_list_names_what_begins_with_a_prefix(store: ObjectStore) -> None:
    assert store.list() == store.list("done/") == {}
    for size, name in enumerate(("done/00001.json", "done/00000.json", "done-so/x", "plan.json")):
        store.put(name, bytes(size))
    assert store.list("done/") == {"done/00000.json": 1, "done/00001.json": 0}
    assert list(store.list("done")) == ["done-so/x", "done/00000.json", "done/00001.json"]
    assert list(store.list("done/00001")) == ["done/00001.json"]


def test_a_thousand_objects_are_listed_in_a_request_or_two(store: ObjectStore, s3: Server, place: str) -> None:
    direct = ObjectStore(s3.url(place, through_proxy=False))
    for number in range(1001):
        direct.put(f"done/{number:05d}.json", b"")
    s3.forget()
    found = store.list("done/")
    assert len(found) == 1001 and len(s3.log()) == 2
    direct.delete(*found)
    assert not store.list()


def test_deleted_is_gone_and_twice_is_no_fault(store: ObjectStore) -> None:
    store.put("plan.json", b"")
    store.delete("plan.json", "never/there.json")
    store.delete("plan.json")
    assert store.list() == {}


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", ""])
def test_no_name_leads_outside(store: ObjectStore, name: str) -> None:
    with pytest.raises(ValueError, match="outside the cache"):
        store.put(name, b"")


# --------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 500},
        {"kind": "cut upload", "after": 2_000_000},
        {"kind": "no answer"},
    ],
    ids=["503", "500", "cut", "no answer"],
)
@pytest.mark.parametrize("verb", ["put", "put_if_absent"])
def test_what_passes_is_ridden_out(
    store: ObjectStore, s3: Server, place: str, fault: dict[str, object], verb: str
) -> None:
    """A storm of eight failures, of a body of 8 MB; nothing half written is ever seen."""
    s3.break_next(match="part-00001", method="PUT", times=8, **fault)  # type: ignore[arg-type]
    data = os.urandom(8_000_000)
    assert getattr(store, verb)("shards/part-00001.arrow", data) is (True if verb == "put_if_absent" else None)
    assert s3.objects(place) == {"shards/part-00001.arrow": data}
    assert puts(s3) == 9 and s3.unfinished_uploads("stores") == []


def test_an_upload_that_is_cut_is_not_there(store: ObjectStore, s3: Server, place: str) -> None:
    s3.break_next(match="part-00001", method="PUT", times=-1, kind="cut upload", after=2_000_000)
    impatient = ObjectStore(store.url, write_attempts=3, first_wait=0.01)
    with pytest.raises(JobFailed, match=r"part-00001.arrow could not be written in 3 attempts: .*run the same command"):
        impatient.put("shards/part-00001.arrow", bytes(8_000_000))
    assert s3.objects(place) == {} and s3.unfinished_uploads("stores") == []


def test_denied_access_is_said_at_once(store: ObjectStore, s3: Server) -> None:
    s3.break_next(match="plan.json", method="PUT", times=-1, kind="status", status=403)
    with pytest.raises(CacheError, match=r"plan.json: access is denied .*AWS_ACCESS_KEY_ID"):
        store.put("plan.json", b"")
    assert puts(s3) == 1


def test_no_such_bucket(s3: Server) -> None:
    with pytest.raises(CacheError, match="no-such-bucket/x/plan.json cannot be written: there is no such bucket"):
        ObjectStore(s3.url("no-such-bucket/x"), first_wait=0.01).put("plan.json", b"")


# --------------------------------------------------------------------------- other writers, and killed ones

WRITER = """
import sys
from teachercache.cache.stores.object_store import ObjectStore
store, mine, races = ObjectStore(sys.argv[1]), sys.argv[2].encode(), range(int(sys.argv[3]))
store.list()
print("ready", flush=True)
sys.stdin.readline()
races = races if mine == b"a" else reversed(races)
print(*(race for race in races if store.put_if_absent(f"done/{race:05d}.json", mine * 1000)))
"""


def process(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_of_writers_at_the_same_time_one_wins_and_its_bytes_stay(store: ObjectStore, s3: Server, place: str) -> None:
    """They begin at both ends, so that each wins some."""
    races = 40
    writers = {name: process(WRITER, store.url, name, str(races)) for name in "ab"}
    for writer in writers.values():
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    won = {name: [int(race) for race in writer.communicate(timeout=120)[0].split()] for name, writer in writers.items()}
    assert sorted(won["a"] + won["b"]) == list(range(races)) and won["a"] and won["b"]
    expected = {f"done/{race:05d}.json": name.encode() * 1000 for name, races_won in won.items() for race in races_won}
    assert s3.objects(place) == expected


PUTTER = """
import sys
from teachercache.cache.stores.object_store import ObjectStore
ObjectStore(sys.argv[1]).put("shards/part-00001.arrow", bytes(64_000_000))
"""


def test_a_writer_killed_in_the_middle_of_an_upload_leaves_nothing(store: ObjectStore, s3: Server, place: str) -> None:
    s3.break_next(match="part-00001", method="PUT", kind="stall upload", after=20_000_000, seconds=5)
    writer = process(PUTTER, store.url)
    while not puts(s3):
        time.sleep(0.01)
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert s3.objects(place) == {} and s3.unfinished_uploads("stores") == []
    store.put("shards/part-00001.arrow", b"whole")
    assert s3.objects(place) == {"shards/part-00001.arrow": b"whole"}


def test_a_forked_process_is_told_to_spawn(store: ObjectStore, tmp_path: Path) -> None:
    """The library's threads do not exist there, and waiting for them would never end."""
    store.put("plan.json", b"")
    child = os.fork()
    if child == 0:
        try:
            store.get("plan.json")
        except CacheError as error:
            (tmp_path / "said").write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    assert "start it by `spawn`" in (tmp_path / "said").read_text()


def test_keys_of_a_profile_are_read(s3: Server, tmp_path: Path) -> None:
    """From a file that the library itself does not read."""
    s3.make_bucket("profiles")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_ACCESS")}
    environment = {**kept, "AWS_PROFILE": "mine", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    code = "import sys; from teachercache.cache.stores.object_store import ObjectStore; ObjectStore(sys.argv[1]).put('x', b'')"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, s3.url("profiles/p")], check=True, env=environment)
    assert s3.objects("profiles/p") == {"x": b""}
