"""A cache through one file: whole, the same bytes each time, resumed, and nothing of a stranger's archive trusted."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from cache.golden_caches import ALIGNED, GOLDEN
from teachercache.cache import verify
from teachercache.cli import main
from teachercache.errors import CacheDamaged, TeachercacheError, UserError
from teachercache.sharing.archive import packing, unpacking
from teachercache.sharing.archive.contents import IS_HEAD
from teachercache.sharing.archive.packing import pack
from teachercache.sharing.archive.unpacking import unpack

from builders import aligned, other_student, sentences, tiny_cache

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an alignment, a card and somebody's signature."""
    folder = tmp_path_factory.mktemp("packed")
    made = tiny_cache(folder, texts=sentences(20), targets={"logits": {"kind": "top-k", "k": 8}})
    aligned(made, other_student(folder / "student"))
    (made / "signatures").mkdir()
    (made / "signatures" / "somebody.sig").write_bytes(b"signed")
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("threads", [1, 3])
def test_what_comes_out_is_what_went_in(cache: Path, tmp_path: Path, threads: int) -> None:
    packed = pack(cache, tmp_path / "a.tar.zst", threads=threads)
    unpacked = unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    assert content(tmp_path / "out") == content(cache) and verify(tmp_path / "out", deep=True) == []
    assert packed["fingerprint"] == unpacked["fingerprint"] and packed["files"] == unpacked["files"] == len(
        content(cache)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.zst", "out"]


def test_the_same_cache_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(cache, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_caches_of_each_format(tmp_path: Path, version: str) -> None:
    folder = GOLDEN / version / ALIGNED
    pack(folder, tmp_path / "a.tar.zst")
    unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder) and verify(tmp_path / "out") == []


@pytest.mark.skipif(shutil.which("tar") is None or shutil.which("zstd") is None, reason="needs tar and zstd")
def test_any_tar_reads_it(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "a.tar.zst")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", tmp_path / "a.tar.zst", "-C", tmp_path / "out"], check=True)
    assert content(tmp_path / "out") == content(cache)


def test_a_killed_pack_goes_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FRAME_BYTES", 1)
    pack(cache, tmp_path / "whole")
    command = (
        "import os, sys; from pathlib import Path; from teachercache.sharing.archive import packing; packing.FRAME_BYTES = 1\n"
        "record = packing._Unfinished.record\n"
        "def dying(self, done, size):\n"
        "    record(self, done, size) if done < int(sys.argv[3]) else os.kill(os.getpid(), 9)\n"
        "packing._Unfinished.record = dying\n"
        "packing.pack(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for when in ("3", "7"):
        died = subprocess.run([sys.executable, "-c", command, str(cache), str(tmp_path / "a"), when], check=False)
        assert died.returncode == -signal.SIGKILL
        assert json.loads((tmp_path / ".a.unfinished.json").read_text())["done"] == int(when) - 1
    written = []
    write = packing._write_member
    monkeypatch.setattr(packing, "_write_member", lambda *a: (written.append(a[1].name), write(*a)))
    result = pack(cache, tmp_path / "a")
    assert len(written) == result["files"] - 6
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


def test_an_unfinished_archive_of_another_cache_is_begun_anew(cache: Path, tmp_path: Path) -> None:
    (tmp_path / ".a.unfinished").write_bytes(b"something")
    (tmp_path / ".a.unfinished.json").write_text(json.dumps({"identity": {}, "done": 5, "size": 9}))
    pack(cache, tmp_path / "a")
    pack(cache, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unpacking_goes_on_and_keeps_what_is_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "FRAME_BYTES", 1)  # a cache of megabytes in little
    monkeypatch.setattr(unpacking, "PIECE", 512)
    pack(cache, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises(CacheDamaged, match="damaged or cut short|it is missing"):
        unpack(tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = {
        name: (tmp_path / "out" / name).stat().st_ino
        for name in content(tmp_path / "out")
        if not IS_HEAD.fullmatch(name)
    }
    [first, *_] = kept
    damaged = tmp_path / "out" / first
    damaged.write_bytes(bytes(damaged.stat().st_size))
    unpack(tmp_path / "a", tmp_path / "out")
    assert content(tmp_path / "out") == content(cache)
    again = {name: (tmp_path / "out" / name).stat().st_ino for name in kept}
    assert [name for name in kept if again[name] != kept[name]] == [first]


def test_a_damaged_cache_is_not_packed(cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    shard = sorted((copy / "shards").glob("*.arrow"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheDamaged, match="sha256 differs"):
        pack(copy, tmp_path / "a")
    shard.write_bytes(shard.read_bytes() + b"?")
    with pytest.raises(CacheDamaged, match="does not hold"):
        pack(copy, tmp_path / "a")
    shard.unlink()
    with pytest.raises(CacheDamaged, match="missing"):
        pack(copy, tmp_path / "a")
    os.mkfifo(shard)
    with pytest.raises(CacheDamaged, match="no regular file"):
        pack(copy, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------- strangers' archives


def members_of(archive: Path) -> Members:
    plain = zstandard.ZstdDecompressor().stream_reader(archive.open("rb"), read_across_frames=True).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def written(archive: Path, members: Members) -> Path:
    with (
        archive.open("wb") as out,
        zstandard.ZstdCompressor().stream_writer(out) as sink,
        tarfile.open(fileobj=sink, mode="w|") as tar,
    ):
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return archive


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def flipped(members: Members) -> Members:
    info, data = members[-3]
    return [*members[:-3], (info, data[:-1] + bytes([data[-1] ^ 1])), *members[-2:]]


def a_listed_one(members: Members) -> int:
    return next(number for number, (info, _) in enumerate(members) if info.name.startswith("shards/"))


FORGED: dict[str, tuple[Callable[[Members], Members], str]] = {
    "a name that leads outside": (lambda all: [*all, member("../outside", b"x")], "outside"),
    "an absolute name": (lambda all: [*all, member("/tmp/outside", b"x")], "outside"),
    "a symbolic link": (lambda all: [*all, member("README.md", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "regular"),
    "a hard link": (lambda all: [*all, member("signatures/a", type=tarfile.LNKTYPE, linkname="manifest.json")], "regular"),
    "a device": (lambda all: [*all, member("signatures/a", type=tarfile.CHRTYPE)], "regular"),
    "a pipe": (lambda all: [*all, member("signatures/a", type=tarfile.FIFOTYPE)], "regular"),
    "a file that nobody lists": (lambda all: [*all, member("shards/more.arrow", b"x")], "does not list it"),
    "an index that nobody lists": (lambda all: [all[0], member("index/more.json", b"{}"), *all[1:]], "does not list it"),
    "a file twice": (lambda all: [*all, all[a_listed_one(all)]], "twice"),
    "the manifest twice": (lambda all: [*all, all[0]], "twice"),
    "no manifest": (lambda all: all[1:], "not among the first"),
    "the manifest last": (lambda all: [*all[1:], all[0]], "not among the first"),
    "a file less": (lambda all: [*all[: a_listed_one(all)], *all[a_listed_one(all) + 1 :]], "missing"),
    "a flipped bit": (flipped, "sha256 differs"),
    "a manifest that was edited": (lambda all: [(all[0][0], all[0][1].replace(b"top-k", b"top-q")), *all[1:]], "digest"),
    "nothing": (lambda all: [], "not among the first"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_archive_ends_in_a_line_and_makes_no_cache(cache: Path, tmp_path: Path, name: str) -> None:
    forge, reason = FORGED[name]
    pack(cache, tmp_path / "a")
    people = ("README.md", "signatures/somebody.sig")
    listed = [item for item in members_of(tmp_path / "a") if item[0].name not in people]
    archive = written(tmp_path / "forged", forge(listed))
    with pytest.raises(TeachercacheError, match=reason) as error:
        unpack(archive, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "forged", "out"]


def test_a_small_archive_that_unfolds_to_gigabytes(tmp_path: Path) -> None:
    """A manifest of 8 GB of zeros takes neither memory nor disk."""
    info = tarfile.TarInfo("manifest.json")
    info.size = 2**33
    with (tmp_path / "a").open("wb") as out, zstandard.ZstdCompressor().stream_writer(out) as sink:
        sink.write(info.tobuf(tarfile.PAX_FORMAT))
        sink.write(bytes(2**22))
    began = time.process_time()
    with pytest.raises(CacheDamaged, match="more than any has"):
        unpack(tmp_path / "a", tmp_path / "out")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("data", [b"", b"no archive", zstandard.compress(b"no tar at all" * 100)])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CacheDamaged):
        unpack(tmp_path / "a", tmp_path / "out")


def test_links_in_the_way_are_not_followed(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "a")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / ".work").mkdir(parents=True)
    elsewhere.mkdir()
    (out / "shards").symlink_to(elsewhere)
    with pytest.raises(UserError, match="in the way"):
        unpack(tmp_path / "a", out)
    assert not list(elsewhere.iterdir())


def test_nothing_is_replaced(cache: Path, tmp_path: Path) -> None:
    pack(cache, tmp_path / "a")
    with pytest.raises(UserError, match="there already"):
        pack(cache, tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="something else"):
        unpack(tmp_path / "a", tmp_path / "out")
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    with pytest.raises(UserError, match="a cache already"):
        unpack(tmp_path / "a", copy)


def test_the_commands(cache: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments in (
        ["pack", str(cache), str(tmp_path / "a")],
        ["unpack", str(tmp_path / "a"), str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert end.value.code == 0 and printed["files"] == len(content(cache)) and len(printed["fingerprint"]) == 64
    with pytest.raises(SystemExit) as end:
        main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "b"), "--json"])
    assert end.value.code == 2 and "no cache" in json.loads(capsys.readouterr().out)["error"]
