"""`pack`: a cache into one file, which any tar with zstd reads.

The archive is a row of zstd frames of whole files, about `FRAME_BYTES` each, compressed by as many threads as are asked for,
with zstd's own checksum. Every listed file is hashed while it is read: what an archive holds is what the manifest says. The
same cache gives the same bytes. Beside an unfinished archive stands how far it is, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

from teachercache.cache.checking import NoProgress, Progress
from teachercache.cache.files.digests import hash_file
from teachercache.cache.files.regular_files import NoRegularFile, open_regular
from teachercache.cache.manifest.manifest import MANIFEST, read_manifest
from teachercache.errors import CacheDamaged, UserError
from teachercache.files import sync_folder, write_whole
from teachercache.sharing.archive.contents import Member, members
from teachercache.version import __version__

FRAME_BYTES = 2**26  # after which a frame ends, at the end of a file
PIECE = 2**20
BLOCK = tarfile.BLOCKSIZE
END = bytes(tarfile.RECORDSIZE)  # two empty blocks end an archive, and tars write whole records
MODE = 0o644


class Sink(Protocol):
    """Destination of bytes."""

    def write(self, data: bytes, /) -> int:
        """Take these bytes."""


def pack(
    folder: Path, archive: Path, *, level: int = 3, threads: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Pack the cache in `folder` into the file `archive`, or go on with that; returns what `--json` prints.

    `level` is zstd's (1 to 19), `threads` compress at a time. Raises `CacheDamaged` for a file that is not as the manifest
    says, `UserError` where there is a finished archive.
    """
    if archive.exists():
        raise UserError(f"{archive} is there already; delete it, or choose another name")
    fingerprint, everything = read_manifest(folder).fingerprint, list(members(folder))
    identity = {"manifest": hash_file(folder / MANIFEST), "level": level, "by": f"teachercache {__version__}"}
    unfinished = _Unfinished.of(archive, {**identity, "members": len(everything)})
    done = unfinished.resume()
    progress = progress or NoProgress()
    progress.begin("bytes", sum(member.bytes for member in everything))
    progress.advance(sum(member.bytes for member in everything[:done]))
    with unfinished.path.open("r+b") as out:
        out.seek(0, os.SEEK_END)
        for frame in _frames(everything[done:]):
            compressor = zstandard.ZstdCompressor(
                level=level, threads=threads if threads > 1 else 0, write_checksum=True
            )
            with compressor.stream_writer(out, closefd=False) as sink:
                for member in frame:
                    _write_member(folder, member, sink, progress)
                    done += 1
                if done == len(everything):
                    sink.write(END)
            out.flush()
            os.fsync(out.fileno())
            unfinished.record(done, out.tell())
    unfinished.finish()
    size = archive.stat().st_size
    return {"archive": str(archive), "cache": str(folder), "files": done, "bytes": size, "fingerprint": fingerprint}


def _frames(everything: list[Member]) -> Iterator[list[Member]]:
    frame: list[Member] = []
    for member in everything:
        frame.append(member)
        if sum(one.bytes for one in frame) >= FRAME_BYTES:
            yield frame
            frame = []
    if frame:
        yield frame


def _write_member(folder: Path, member: Member, sink: Sink, progress: Progress) -> None:
    """Header, bytes and padding of one file, which is compared with its digest."""
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = member.bytes, MODE
    sink.write(info.tobuf(tarfile.PAX_FORMAT))
    digest, count = hashlib.sha256(), 0
    try:
        with open_regular(folder, member.name) as stream:
            while count < member.bytes and (piece := stream.read(min(PIECE, member.bytes - count))):
                digest.update(piece)
                count += len(piece)
                sink.write(piece)
                progress.advance(len(piece))
            more = stream.read(1)
    except FileNotFoundError:
        raise _damaged(folder, member, "it is missing") from None
    except NoRegularFile as error:
        raise _damaged(folder, member, str(error)) from None
    if count < member.bytes or more:
        raise _damaged(folder, member, f"it does not hold {member.bytes} bytes")
    if member.sha256 is not None and digest.hexdigest() != member.sha256:
        raise _damaged(folder, member, "its sha256 differs from the manifest's")
    sink.write(bytes(-count % BLOCK))


def _damaged(folder: Path, member: Member, reason: str) -> CacheDamaged:
    return CacheDamaged(f"{folder / member.name}: {reason}; fetch it again, or precompute the cache again")


@dataclass(frozen=True)
class _Unfinished:
    """An archive that is not whole yet, and how far it is."""

    archive: Path
    identity: dict[str, Any]

    @classmethod
    def of(cls, archive: Path, identity: dict[str, Any]) -> _Unfinished:
        """The one beside `archive`; its folder is made."""
        archive.parent.mkdir(parents=True, exist_ok=True)
        return cls(archive, identity)

    @property
    def path(self) -> Path:
        """Its bytes."""
        return self.archive.with_name(f".{self.archive.name}.unfinished")

    @property
    def _record(self) -> Path:
        return self.archive.with_name(f".{self.archive.name}.unfinished.json")

    def resume(self) -> int:
        """Number of members that are in it, and on the disk; what follows them is cut off. One of another cache, or with other
        settings, is begun anew."""
        done, size = 0, 0
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if record["identity"] == self.identity and self.path.stat().st_size >= record["size"]:
                done, size = int(record["done"]), int(record["size"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        with self.path.open("ab") as stream:
            stream.truncate(size)
        return done

    def record(self, done: int, size: int) -> None:
        """Write down that so many members are in its first `size` bytes."""
        write_whole(self._record, json.dumps({"identity": self.identity, "done": done, "size": size}))

    def finish(self) -> None:
        """Give it its name."""
        self.path.replace(self.archive)
        sync_folder(self.archive.parent)
        self._record.unlink(missing_ok=True)
