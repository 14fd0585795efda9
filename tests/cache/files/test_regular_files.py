"""Links, pipes and devices in a cache: refused wherever it is read, and nothing waits for them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.files.regular_files import NO_FILE, NoRegularFile, open_regular, read_regular
from teachercache.cache.inspection import describe_row
from teachercache.errors import CacheDamaged, TeachercacheError
from teachercache.stream.tokenizers import teacher_tokenizer

from builders import aligned, other_student, tiny_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    logits = {"kind": "head+sketch", "k": 4, "rank": 8, "calibration_positions": 64}
    cache = tiny_cache(folder, targets={"logits": logits})
    aligned(cache, other_student(folder / "student"))
    return cache


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, _: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {
    "link": lambda path, whole: path.symlink_to(whole),
    "link within": lambda path, whole: (shutil.copy(whole, path.parent / "aside"), path.symlink_to("aside")),
    "link to zeros": lambda path, _: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path, _: path.symlink_to("/nowhere"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "pipe": _pipe,
    "socket": _socket,
    "folder": lambda path, _: path.mkdir(),
}


def _read_all(folder: Path) -> None:
    cache = Cache.open(folder)
    cache.read_row("train", 0)
    _ = cache.boundary
    describe_row(cache, "train:0")
    teacher_tokenizer(cache)
    for alignment in CacheAlignment.all_of(cache):
        _ = alignment.vocabulary, alignment.begins_V
        alignment.read_row("train", 0)
        with alignment.tokenizer_folder():
            pass


WHAT = ["shards/part-00000*", "teacher/tokenizer.json", "teacher/sketch-*", "teacher/boundary-*", "alignments/*/vocabulary*",
        "alignments/*/part-00000*", "alignments/*/tokenizer/tokenizer.json", "alignments/*/alignment.json"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WHAT)
def test_what_is_no_regular_file_is_refused(made: Path, tmp_path: Path, what: str, kind: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    [path] = folder.glob(what)
    [whole] = made.glob(what)
    path.unlink()
    KINDS[kind](path, whole)
    with at_most(10):
        reasons = {problem.file: problem.reason for problem in verify(folder)}
        assert NO_FILE in reasons.get(path.relative_to(folder).as_posix(), "") or (
            kind == "folder" and "alignment.json" in what
        )
        if kind == "folder" and "alignment.json" in what:
            return  # then there is no alignment
        with pytest.raises(CacheDamaged, match="no regular file") as caught:
            _read_all(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["link", "pipe", "link to zeros"])
def test_a_manifest_that_is_no_regular_file_is_refused(made: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    (folder / "manifest.json").unlink()
    KINDS[kind](folder / "manifest.json", made / "manifest.json")
    with at_most(10), pytest.raises(TeachercacheError) as caught:
        Cache.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder_name", ["shards", "teacher", "alignments"])
def test_a_folder_behind_a_link_is_refused(made: Path, tmp_path: Path, folder_name: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    (folder / folder_name).rename(tmp_path / "elsewhere")
    (folder / folder_name).symlink_to(tmp_path / "elsewhere")
    assert verify(folder)
    if folder_name != "alignments":  # no alignment is found behind a link
        with pytest.raises(CacheDamaged, match="no regular file"):
            _read_all(folder)


def test_the_cache_itself_may_be_a_link(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    _read_all(tmp_path / "link")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside", "."])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "cache" / "a").mkdir(parents=True)
    with pytest.raises((NoRegularFile, ValueError)):
        read_regular(tmp_path / "cache", name, most=100)


def test_a_large_file_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match="at most 1000 are possible"):
        read_regular(tmp_path, "sparse", most=1000)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    (tmp_path / "a" / "file").write_text("x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        open_regular(tmp_path, "a/file").close()
        for name in ("a/link", "a", "a/file/x", "../x"):
            with pytest.raises(NoRegularFile):
                open_regular(tmp_path, name)
        with pytest.raises(FileNotFoundError):
            open_regular(tmp_path, "a/b/c")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_file_that_takes_the_place_of_a_checked_one_is_checked_anew(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    cache = Cache.open(folder)
    info = cache.manifest.shards[0].rows_file
    with cache.source.opened(info) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    (folder / "other").write_bytes(data)
    with cache.source.opened(info) as stream:
        (folder / "other").replace(folder / info.file)
        assert stream.read() == (made / info.file).read_bytes(), "what is open stays what was checked"
    with pytest.raises(CacheDamaged, match="differs from its sha256"), cache.source.opened(info):
        pass
