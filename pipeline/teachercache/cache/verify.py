"""Is a cache whole? Every file against the manifest: presence, size, sha256, schema and counts, and no unlisted file.

sha256 runs at about 1.8 GB/s; `quick` skips it and takes milliseconds a shard. Of a cache in an object store every byte is
fetched, past the local copies and one file at a time; `quick` compares the names and sizes that the store lists.

`deep` reads every row as training does, so that values are checked as well: ids within the vocabulary, heads sorted, numbers
finite, row ids unique, an alignment's chunks over all tokens. It decodes all of a cache, which takes minutes a GB.

`workers` files are checked at a time, in threads; `deep` reads rows in as many processes.

Names that are reserved (`is_reserved`) belong to people and to later steps: they are not listed, never read as data, and
bounded.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa

from teachercache.cache.checking import Checks, Expected, NoProgress, Progress
from teachercache.cache.files.column_groups import Group
from teachercache.cache.files.digests import hash_file
from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.files.listing import files_below
from teachercache.cache.files.regular_files import (
    MOST_MANIFEST_BYTES,
    NoRegularFile,
    open_regular,
    path_of_open,
    read_regular,
)
from teachercache.cache.manifest.alignment_manifest import ALIGNMENT, ALIGNMENTS, AlignmentManifest, parse_alignment
from teachercache.cache.manifest.manifest import MANIFEST, WORK_FOLDER, read_listed, read_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.manifest.snapshots import SNAPSHOTS
from teachercache.cache.problem import Problem
from teachercache.cache.reader import groups_of_cache
from teachercache.cache.shards.one_column import batches_of_columns, hashes_of
from teachercache.cache.shards.row_batch import numbers
from teachercache.cache.shards.row_ids import check_same_rows
from teachercache.cache.storage.source import read_listed_object, remote_manifest
from teachercache.cache.stores.object_store import AGAIN, ObjectStore
from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError

CARD = "README.md"  # people may add to it
RESERVED_FILES = frozenset({CARD, "croissant.json", "lease.json", "partial.json"})
RESERVED_FOLDERS = ("signatures", SNAPSHOTS)
MOST_RESERVED_BYTES = 2**26  # of one file with a reserved name
MOST_RESERVED_FILES = 10_000
NOT_LISTED = "the manifest does not list it"
LEAVE_OUT = "delete it, unless you know where it comes from"
FETCH = "fetch this file again, or delete the cache and precompute it again"
ALIGN = "delete its folder and run `teachercache align` again"


def verify(
    location: str | Path, *, quick: bool = False, deep: bool = False, workers: int = 1, progress: Progress | None = None
) -> list[Problem]:
    """Check the cache in a folder or at a URL; an empty list means that it is whole.

    `quick` compares sizes, schemas and counts without hashing; `deep` reads every row too, once all files are as they should
    be. `workers` files are hashed at a time; rows are read in as many processes. Raises `CacheError` when there is no finished
    cache, and for a URL what `ObjectStore.pieces` does.
    """
    checks = Checks(workers, progress or NoProgress())
    try:
        problems = _verify_files(location, checks, quick=quick)
    except CacheDamaged as error:  # of a manifest that describes no cache
        return [Problem(MANIFEST, str(error), "fetch the cache again, or precompute it again")]
    return checks.of_rows(location) if deep and not problems else problems


def _verify_files(location: str | Path, checks: Checks, *, quick: bool) -> list[Problem]:
    try:
        if is_url(location):
            store = ObjectStore(str(location))
            return list(_wrong_objects(remote_manifest(store), store, checks, quick=quick))
        folder = Path(location)
        manifest = read_manifest(folder)
    except CacheDamaged as error:
        return [Problem(MANIFEST, str(error), "fetch the cache again, or precompute it again")]
    try:
        sizes = files_below(folder)
    except ValueError as error:
        return [Problem(folder.name, str(error), LEAVE_OUT)]
    read = partial(read_regular, folder, most=MOST_MANIFEST_BYTES)
    why = partial(_why_wrong, folder, quick=quick)
    return list(
        _problems(manifest, sizes, checks, read=read, listed=partial(read_listed, folder), why=why, remedy=FETCH)
    )


def is_reserved(name: str) -> bool:
    """Tells whether a file's name belongs to people or to later steps, not to the data: the card, signatures, earlier
    manifests, a lease, what a copy of parts holds, what an unfinished job left."""
    return name in RESERVED_FILES or name.partition("/")[0] in RESERVED_FOLDERS or _is_work(name)


def _is_work(name: str) -> bool:
    """Tells whether a file belongs to a job that is not finished, or that was killed before it had removed it."""
    first, *below = name.split("/")
    return first == WORK_FOLDER or (first == ALIGNMENTS and below[1:2] == [WORK_FOLDER])


def _problems(
    manifest: Manifest,
    sizes: Mapping[str, int],
    checks: Checks,
    *,
    read: Callable[[str], bytes],
    listed: Callable[[str, int], bytes],
    why: Callable[[Expected], str | None],
    remedy: str,
) -> Iterator[Problem]:
    """Everything that is wrong; `sizes` are the files that are there, by name, -1 for one that is no regular
    file."""
    others = dict.fromkeys(name for name in sizes if name != MANIFEST)
    expected_files = list(_expected(manifest))
    checks.progress.begin("bytes", sum(expected.info.bytes for expected in expected_files))
    for info, reason in checks.of_files(expected_files, why):
        others.pop(info.file, None)
        if reason:
            yield Problem(info.file, reason, remedy)
    for name in [name for name in others if name.startswith(f"{ALIGNMENTS}/") and name.endswith(f"/{ALIGNMENT}")]:
        del others[name]
        try:
            alignment = parse_alignment(read(name), listed, cache=manifest, name=name, behind=True)
        except (CacheDamaged, CacheError, ValueError, OSError) as error:
            yield Problem(name, str(error), remedy if remedy == AGAIN else ALIGN)
            continue
        listed_files = list(_expected_of_alignment(alignment))
        checks.progress.begin("bytes", sum(expected.info.bytes for expected in listed_files))
        for info, reason in checks.of_files(listed_files, why):
            others.pop(info.file, None)
            if reason:
                yield Problem(info.file, reason, remedy if remedy == AGAIN else ALIGN)
    yield from (_unlisted(name) for name in others if not is_reserved(name))
    yield from _wrong_reserved({name: sizes[name] for name in others if is_reserved(name)})


def _expected(manifest: Manifest) -> Iterator[Expected]:
    groups = {group.folder: group for group in groups_of_cache(manifest, manifest.stored_targets())}
    for shard in manifest.shards:
        for folder, info in shard.files.items():
            yield Expected(info, groups.get(folder), shard)
    yield from (Expected(info) for info in (*manifest.files, *manifest.index))


def _expected_of_alignment(alignment: AlignmentManifest) -> Iterator[Expected]:
    for shard in alignment.shards:
        yield Expected(shard.rows_file, alignment.group, shard)
    yield from (Expected(info) for info in (*alignment.files, *alignment.index))


def _wrong_reserved(sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Nobody reads these files as data; they may not be anything, and not be endless."""
    for name, size in sizes.items():
        if size < 0:
            yield Problem(name, "it is no regular file", LEAVE_OUT)
        elif size > MOST_RESERVED_BYTES and not _is_work(name):
            yield Problem(name, f"it holds {size} bytes, at most {MOST_RESERVED_BYTES} are allowed there", LEAVE_OUT)
    count = sum(not _is_work(name) for name in sizes)
    if count > MOST_RESERVED_FILES:
        folders = " and ".join(RESERVED_FOLDERS)
        yield Problem(folders, f"they hold {count} files, at most {MOST_RESERVED_FILES} are allowed", LEAVE_OUT)


def _unlisted(name: str) -> Problem:
    if name.startswith(f"{ALIGNMENTS}/"):
        folder = "/".join(name.split("/")[:2])
        return Problem(name, "no alignment lists it", f"finish it with `teachercache align`, or delete {folder}")
    return Problem(name, NOT_LISTED, LEAVE_OUT)


def _wrong_objects(manifest: Manifest, store: ObjectStore, checks: Checks, *, quick: bool) -> Iterator[Problem]:
    sizes = store.list()

    def why(expected: Expected) -> str | None:
        size = sizes.get(expected.info.file)
        if size is None:
            return "it is missing"
        if size != expected.info.bytes:
            return f"it holds {size} bytes, the manifest says {expected.info.bytes}"
        return None if quick else _why_wrong_object(store, expected)

    listed = partial(read_listed_object, store)
    yield from _problems(
        manifest,
        sizes,
        checks,
        read=partial(store.read, most=MOST_MANIFEST_BYTES),
        listed=listed,
        why=why,
        remedy=AGAIN,
    )


def _why_wrong_object(store: ObjectStore, expected: Expected) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "copy"
        with path.open("wb") as stream:
            stream.writelines(store.pieces(expected.info.file))
        return _why_wrong_file(path, expected, quick=False)


def _why_wrong(folder: Path, expected: Expected, *, quick: bool) -> str | None:
    try:
        with open_regular(folder, expected.info.file) as stream:
            return _why_wrong_file(path_of_open(stream), expected, quick=quick)
    except FileNotFoundError:
        return "it is missing"
    except NoRegularFile as error:
        return str(error)


def _why_wrong_file(path: Path, expected: Expected, *, quick: bool) -> str | None:
    info = expected.info
    if path.stat().st_size != info.bytes:
        return f"it holds {path.stat().st_size} bytes, the manifest says {info.bytes}"
    if not quick and hash_file(path) != info.sha256:
        return "its sha256 differs from the manifest's: bytes are damaged or were changed"
    if expected.group is None or expected.shard is None:
        return None
    return _why_wrong_shard(path, expected.group, expected.shard)


def _why_wrong_shard(path: Path, group: Group, shard: ShardInfo) -> str | None:
    try:
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
            group.checked(schema)
            positions, row_ids = _counted(source, schema, shard, has_rows=group.has_rows)
            check_same_rows(row_ids, shard.row_ids)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        return f"it cannot be read as a shard: {str(error).splitlines()[0]}"
    except CacheDamaged as error:
        return str(error)
    if positions not in (None, shard.positions):
        return f"it holds {positions} positions, the manifest says {shard.positions}"
    return None


def _counted(
    source: pa.MemoryMappedFile, schema: pa.Schema, shard: ShardInfo, *, has_rows: bool
) -> tuple[int | None, str]:
    """Positions of a file that counts them, and the digest of its rows, in one pass; raises as `batches_of_columns`."""
    positions, digest = 0, hashlib.sha256()
    names = ["row_id", "positions"] if has_rows else ["row_id"]
    for row_ids, *counts in batches_of_columns(source, names, rows=shard.rows, schema=schema):
        positions += sum(_summed(column) for column in counts)
        if shard.row_ids:  # format 1 tells none
            digest.update(hashes_of(row_ids))
    return positions if has_rows else None, digest.hexdigest()


def _summed(counts: pa.Array) -> int:
    if counts.null_count:
        raise ValueError("column positions has no value in some row")
    return int(numbers(counts).sum())
