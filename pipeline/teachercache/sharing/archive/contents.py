"""Contents of an archive, in the order in which they stand in it.

First the heads: manifest.json, each alignment.json, and the index files that they name, so that whoever unpacks knows of every
further member what it has to be before its first byte. Then what these list, and last what belongs to people (README.md,
signatures): it has no digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teachercache.cache.files.entries import FileInfo
from teachercache.cache.files.listing import files_below
from teachercache.cache.files.regular_files import MOST_MANIFEST_BYTES, NoRegularFile, open_regular, read_regular
from teachercache.cache.manifest.alignment_manifest import ALIGNMENT, ALIGNMENTS, AlignmentManifest, parse_alignment
from teachercache.cache.manifest.manifest import MANIFEST, read_listed, read_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.errors import CacheDamaged

IS_HEAD = re.compile(r"manifest\.json|alignments/[^/]+/alignment\.json|(alignments/[^/]+/)?index/[^/]+")
IS_OF_PEOPLE = re.compile(r"README\.md|croissant\.json|partial\.json|(signatures|snapshots)/.+")
MOST_HEAD_BYTES = 2**30  # of all heads of an archive
MOST_OF_PEOPLE_BYTES = 2**26  # of one file without a digest
MOST_OF_PEOPLE = 10_000


@dataclass(frozen=True)
class Member:
    """A file of the cache; `sha256` is None where nothing lists one: of the manifest, of an alignment.json and of what belongs
    to people."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Described:
    """A cache as its manifests describe it."""

    manifest: Manifest
    alignments: tuple[AlignmentManifest, ...]

    @classmethod
    def in_folder(cls, folder: Path, names: Iterable[str]) -> Described:
        """The manifest of a folder, and the alignments whose alignment.json is among `names`. Raises as readers do."""
        manifest = read_manifest(folder)
        read = partial(read_regular, folder, most=MOST_MANIFEST_BYTES)
        listed = partial(read_listed, folder)
        return cls(manifest, tuple(parse_alignment(read(name), listed, cache=manifest, name=name) for name in names))

    @property
    def index(self) -> list[FileInfo]:
        """The index files."""
        return [*self.manifest.index, *(info for alignment in self.alignments for info in alignment.index)]

    @property
    def data(self) -> list[FileInfo]:
        """Every other file that a manifest lists."""
        index = {info.file for info in self.index}
        files = [*self.manifest.all_files, *(info for alignment in self.alignments for info in alignment.all_files)]
        return [info for info in files if info.file not in index]


def members(folder: Path) -> Iterator[Member]:
    """Files of the cache in `folder`, in the order of an archive. Raises `CacheDamaged` for a file of people that is no regular
    file; whether the others are as they should be is seen when they are read."""
    alignments = alignments_of(folder)
    described = Described.in_folder(folder, alignments)
    yield from (Member(name, _size(folder, name)) for name in (MANIFEST, *alignments))
    yield from (Member(info.file, info.bytes, info.sha256) for info in (*described.index, *described.data))
    try:
        names = files_below(folder)
    except ValueError as error:
        raise CacheDamaged(f"{folder}: {error}; delete what is not the cache's") from None
    yield from (Member(name, _size(folder, name)) for name in names if IS_OF_PEOPLE.fullmatch(name))


def alignments_of(folder: Path) -> list[str]:
    """Names of the alignment.json files of a cache."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{ALIGNMENTS}/*/{ALIGNMENT}"))


def _size(folder: Path, name: str) -> int:
    try:
        with open_regular(folder, name) as stream:
            return stream.seek(0, 2)
    except NoRegularFile as error:
        raise CacheDamaged(f"{folder / name}: {error}; delete it, unless you know where it comes from") from None
