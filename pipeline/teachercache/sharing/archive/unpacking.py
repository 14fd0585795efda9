"""`unpack`: a cache out of an archive, of which nothing is trusted.

Heads come first and say what every further member has to be: one that nobody lists, that is no regular file, has another size
or other bytes ends the job. Files go to their places as they come, in bounded memory and without a second copy; manifest.json
goes last, so that half a cache is none. The same command goes on: files that are there and whole are kept.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from teachercache.cache.checking import NoProgress, Progress
from teachercache.cache.files.digests import hash_file
from teachercache.cache.files.entries import check_inside
from teachercache.cache.files.regular_files import MOST_MANIFEST_BYTES
from teachercache.cache.manifest.alignment_manifest import ALIGNMENT, parse_alignment
from teachercache.cache.manifest.index import MOST_INDEX_BYTES
from teachercache.cache.manifest.manifest import MANIFEST, WORK_FOLDER, parse_manifest, read_listed
from teachercache.errors import CacheDamaged, UserError
from teachercache.files import sync, sync_folder
from teachercache.sharing.archive.contents import (
    IS_HEAD,
    IS_OF_PEOPLE,
    MOST_HEAD_BYTES,
    MOST_OF_PEOPLE,
    MOST_OF_PEOPLE_BYTES,
    Described,
    Member,
)

PIECE = 2**20
MOST_WINDOW = 2**27  # bytes of memory that a frame may ask for, as the zstd tool allows
REMEDY = "fetch the archive again, or ask who made it"


def unpack(archive: Path, folder: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Unpack the cache in the file `archive` into `folder`, or go on with that; returns what `--json` prints.

    Raises `CacheDamaged` for an archive that holds anything but one whole cache, `UserError` where `folder` holds something
    else.
    """
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds a cache already; delete it, or choose another folder")
    if folder.exists() and not (folder / WORK_FOLDER).is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else; choose another folder")
    try:
        with archive.open("rb") as packed:
            job = _Unpacking(archive, folder, progress or NoProgress())
            job.take(_members(packed))
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise CacheDamaged(f"{archive} is damaged or cut short ({error}); {REMEDY}") from None
    return job.finish()


def _members(packed: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Headers of an archive with their contents, which are to be read before the next one."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    with (
        decompressor.stream_reader(packed, read_across_frames=True, closefd=False) as plain,
        tarfile.open(fileobj=plain, mode="r|", bufsize=PIECE) as tar,
    ):
        for info in tar:
            yield info, tar.extractfile(info) if info.isreg() else None
        while plain.read(PIECE):  # up to the last checksum
            pass


class _Unpacking:
    """A folder that becomes a cache."""

    def __init__(self, archive: Path, folder: Path, progress: Progress) -> None:
        self._archive, self._folder, self._progress = archive, folder, progress
        self._work = folder / WORK_FOLDER
        self._heads: dict[str, bytes] = {}  # manifest.json and the alignment.json files, which are written last
        self._head_bytes = self._of_people = 0
        self._expected: dict[str, Member] | None = None  # once all heads are here: what is to come
        self._described: Described | None = None
        self._seen: set[str] = set()

    def take(self, members: Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]) -> None:
        """Write every member to its place. Raises `CacheDamaged`."""
        self._work.mkdir(parents=True, exist_ok=True)
        for info, content in members:
            if content is None:
                raise self._wrong(info.name, "it is no regular file")
            try:
                check_inside(info.name)
            except ValueError as error:
                raise self._wrong(info.name, str(error)) from None
            if info.name in self._seen:
                raise self._wrong(info.name, "it is in there twice")
            self._seen.add(info.name)
            if self._expected is None and IS_HEAD.fullmatch(info.name):
                self._take_head(info, content)
            else:
                self._write(self._member(info), content)

    def finish(self) -> dict[str, Any]:
        """Write the manifests once all that they list is here; from then on the folder is a cache."""
        self._understand()
        assert self._expected is not None and self._described is not None
        if self._expected:
            name = next(iter(self._expected))
            raise self._wrong(name, f"it is missing, as {len(self._expected)} listed files are")
        for name in sorted(self._heads, key=lambda name: name == MANIFEST):  # the cache's own last
            path = self._folder / name
            self._put(path, self._heads[name])
        shutil.rmtree(self._work)
        manifest = self._described.manifest
        return {
            "cache": str(self._folder),
            "archive": str(self._archive),
            "files": len(self._seen),
            "rows": manifest.rows,
            "fingerprint": manifest.fingerprint,
        }

    def _take_head(self, info: tarfile.TarInfo, content: IO[bytes]) -> None:
        is_manifest = info.name == MANIFEST or info.name.endswith(f"/{ALIGNMENT}")
        most = MOST_MANIFEST_BYTES if is_manifest else MOST_INDEX_BYTES
        self._head_bytes += info.size
        if info.size > most or self._head_bytes > MOST_HEAD_BYTES:
            raise self._wrong(info.name, f"it holds {info.size} bytes, more than any has")
        if is_manifest:
            self._heads[info.name] = content.read(info.size)
        else:
            self._write(Member(info.name, info.size), content)

    def _understand(self) -> None:
        """Read the heads: what follows them is known from here on."""
        if self._expected is not None:
            return
        if MANIFEST not in self._heads:
            raise self._wrong(MANIFEST, "it is not among the first files: this is no archive of a cache")

        def listed(name: str, size: int) -> bytes:
            return read_listed(self._folder, name, size)

        name = f"{self._archive}, {MANIFEST}"
        manifest = parse_manifest(lambda: self._heads[MANIFEST], listed, name=name)
        alignments = tuple(
            parse_alignment(data, listed, cache=manifest, name=f"{self._archive}, {head}")
            for head, data in self._heads.items()
            if head != MANIFEST
        )
        self._described = Described(manifest, alignments)
        self._expected = {info.file: Member(info.file, info.bytes, info.sha256) for info in self._described.data}
        index = {info.file for info in self._described.index}
        for unlisted in self._seen - index - self._heads.keys() - self._expected.keys():
            if IS_HEAD.fullmatch(unlisted):
                raise self._wrong(unlisted, "the manifest does not list it")
        self._progress.begin("bytes", sum(member.bytes for member in self._expected.values()))

    def _member(self, info: tarfile.TarInfo) -> Member:
        """The member as it has to be, of what comes after the heads."""
        self._understand()
        assert self._expected is not None
        expected = self._expected.pop(info.name, None)
        if expected is None:
            self._of_people += 1
            if not IS_OF_PEOPLE.fullmatch(info.name):
                raise self._wrong(info.name, "the manifest does not list it")
            if info.size > MOST_OF_PEOPLE_BYTES or self._of_people > MOST_OF_PEOPLE:
                raise self._wrong(
                    info.name, f"it holds {info.size} bytes, or is one of too many files without a digest"
                )
            return Member(info.name, info.size)
        if info.size != expected.bytes:
            raise self._wrong(info.name, f"it holds {info.size} bytes, the manifest says {expected.bytes}")
        return expected

    def _write(self, member: Member, content: IO[bytes]) -> None:
        """Write a file that is not here yet, by way of a temporary one."""
        path = self._folder / member.name
        if self._is_there(path, member):
            self._progress.advance(member.bytes)
            return
        self._make_folders(path.parent)
        temporary, digest = self._work / "member", hashlib.sha256()
        with temporary.open("wb") as stream:
            while piece := content.read(PIECE):
                digest.update(piece)
                stream.write(piece)
                if member.sha256 is not None:
                    self._progress.advance(len(piece))
        if member.sha256 is not None and digest.hexdigest() != member.sha256:
            raise self._wrong(member.name, "its sha256 differs from the manifest's: bytes are damaged or were changed")
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)

    def _is_there(self, path: Path, member: Member) -> bool:
        """Tells whether an earlier attempt has written a file whole."""
        if member.sha256 is None or path.is_symlink() or not path.is_file() or path.stat().st_size != member.bytes:
            return False
        return hash_file(path) == member.sha256

    def _make_folders(self, folder: Path) -> None:
        """Make the folders that lead to a file. Raises `UserError` for a link among them: it may lead anywhere."""
        below = folder.relative_to(self._folder).parts
        for depth in range(1, len(below) + 1):
            step = self._folder.joinpath(*below[:depth])
            if step.is_symlink() or (step.exists() and not step.is_dir()):
                raise UserError(f"{step} is in the way of a folder of the cache; delete it, or choose another folder")
            step.mkdir(exist_ok=True)

    def _put(self, path: Path, data: bytes) -> None:
        self._make_folders(path.parent)
        temporary = self._work / "head"
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)

    def _wrong(self, name: str, reason: str) -> CacheDamaged:
        return CacheDamaged(f"{self._archive}, {name[:200]!r}: {reason}; {REMEDY}")
