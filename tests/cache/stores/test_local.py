"""A store keeps its word: whole objects, one winner of a race, nothing half in sight."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import signal
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from cache.deep_folders import nest, remove
from teachercache.cache.files.regular_files import NoRegularFile
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.stores.store import Store
from teachercache.errors import CacheError

RACES = 40
WRITERS = 2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "cache")


def test_an_object_is_what_was_put_last(store: Store) -> None:
    store.put("done/00000.json", b"first")
    store.put("done/00000.json", memoryview(b"second"))
    assert store.get("done/00000.json") == b"second"
    assert pickle.loads(pickle.dumps(store)).get("done/00000.json") == b"second"


def test_an_object_that_is_there_stays(store: Store) -> None:
    assert store.put_if_absent("plan.json", b"ours")
    assert not store.put_if_absent("plan.json", b"theirs")
    assert store.get("plan.json") == b"ours"


def test_list_names_what_begins_with_a_prefix(store: Store) -> None:
    assert store.list() == store.list("done/") == {}
    for size, name in enumerate(("done/00001.json", "done/00000.json", "done-so/x", "plan.json")):
        store.put(name, bytes(size))
    assert store.list("done/") == {"done/00000.json": 1, "done/00001.json": 0}
    assert list(store.list("done")) == ["done-so/x", "done/00000.json", "done/00001.json"]
    assert list(store.list("done/00001")) == ["done/00001.json"]
    assert list(store.list()) == ["done-so/x", "done/00000.json", "done/00001.json", "plan.json"]


def test_deleted_is_gone_and_twice_is_no_fault(store: Store) -> None:
    store.put("plan.json", b"")
    store.put("done/00000.json", b"")
    store.delete("plan.json", "done/00000.json", "never/there.json")
    store.delete("plan.json")
    assert store.list() == {}
    with pytest.raises(FileNotFoundError):
        store.get("plan.json")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", ""])
def test_no_name_leads_outside(store: LocalStore, name: str) -> None:
    with pytest.raises(ValueError, match="outside the cache"):
        store.put(name, b"")
    assert not list(store.folder.parent.iterdir())


def test_a_link_is_no_object(store: LocalStore) -> None:
    store.put("plan.json", b"")
    (store.folder / "link.json").symlink_to("plan.json")
    with pytest.raises(NoRegularFile):
        store.get("link.json")


@pytest.mark.parametrize("verb", ["put", "delete", "list", "sweep"])
def test_a_link_leads_nothing_out_of_the_folder(store: LocalStore, tmp_path: Path, verb: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "thesis.tex").write_text("precious")
    store.put("plan.json", b"")
    (store.folder / "done").symlink_to(tmp_path / "outside")
    calls = {
        "put": lambda: store.put("done/thesis.tex", b""),
        "delete": lambda: store.delete("done/thesis.tex"),
        "list": lambda: store.list("done/"),
        "sweep": lambda: store.sweep("done/"),
    }
    with pytest.raises(CacheError, match="is a link, which would lead"):
        calls[verb]()
    assert list(store.list()) == ["done", "plan.json"]
    assert [path.read_text() for path in (tmp_path / "outside").iterdir()] == ["precious"]


def test_folders_that_hold_nothing_go(store: LocalStore) -> None:
    store.put("a/b/c.json", b"")
    store.put("a/d.json", b"")
    store.delete("a/b/c.json")
    assert [path.name for path in (store.folder / "a").iterdir()] == ["d.json"]
    store.delete("a/d.json")
    assert store.folder.is_dir() and not list(store.folder.iterdir())


def test_folders_without_end_hold_nobody_up(store: LocalStore) -> None:
    store.put("index/a.json", b"a")
    nest(store.folder / "index" / "deep")
    try:
        assert store.list() == store.list("index/") == {"index/a.json": 1}
        store.sweep("index/")
        store.delete("index/a.json")
        assert store.list() == {}
    finally:
        remove(store.folder)


def test_another_process_finds_it_wherever_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    travelling = pickle.dumps(LocalStore(Path("cache")))
    monkeypatch.chdir("/")
    assert pickle.loads(travelling).folder == tmp_path / "cache"


def test_a_write_that_fails_leaves_nothing(store: LocalStore) -> None:
    (store.folder / "done" / "00000.json").mkdir(parents=True)
    with pytest.raises(OSError):
        store.put("done/00000.json", b"a folder is in its way")
    assert [path.name for path in (store.folder / "done").iterdir()] == ["00000.json"]


def test_what_a_killed_writer_leaves_is_no_object(store: LocalStore) -> None:
    """The child is killed in the middle of the bytes."""
    child = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(store,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGXFSZ
    assert len(list(store.folder.iterdir())) == 1 and store.list() == {}
    store.sweep()
    assert not list(store.folder.iterdir())


def _die_while_writing(store: LocalStore) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    store.put("plan.json", bytes(2000))


def test_of_writers_at_the_same_time_one_wins_and_its_bytes_stay(store: LocalStore) -> None:
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(WRITERS), context.SimpleQueue()
    writers = [context.Process(target=_race, args=(store, start, won, writer)) for writer in range(WRITERS)]
    for writer in writers:
        writer.start()
    wins = dict(won.get() for _ in range(RACES))  # one a race: a second winner of one would leave another without
    for writer in writers:
        writer.join()
    assert won.empty() and sorted(wins) == list(range(RACES))
    assert {race: store.get(f"done/{race}") for race in wins} == {
        race: _bytes_of(writer) for race, writer in wins.items()
    }


def _bytes_of(writer: int) -> bytes:
    return bytes([writer]) * 5000


def _race(store: LocalStore, start: Barrier, won: SimpleQueue[tuple[int, int]], writer: int) -> None:
    for race in range(RACES):
        start.wait()
        if store.put_if_absent(f"done/{race}", _bytes_of(writer)):
            won.put((race, writer))
