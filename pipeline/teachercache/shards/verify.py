"""Is a cache whole? Every file against the manifest: presence, size, sha256, schema and counts, and no unlisted file.

sha256 runs at about 1.8 GB/s; `quick` skips it and takes milliseconds a shard. Of a cache in an object store every byte is
fetched, past the local copies and one file at a time; `quick` compares the names and sizes that the store lists.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError
from teachercache.shards.claims import MOST_BATCH_BYTES
from teachercache.shards.ipc_blocks import Blocks
from teachercache.shards.manifest import MANIFEST, FileInfo, Manifest, ShardInfo, hash_file, read_manifest
from teachercache.shards.object_store import AGAIN, ObjectStore
from teachercache.shards.regular_files import (
    MOST_MANIFEST_BYTES,
    NoRegularFile,
    open_regular,
    path_of_open,
    read_regular,
)
from teachercache.shards.schema import check_schema, shard_metadata
from teachercache.shards.sidecar_manifest import ALIGNMENTS, SIDECAR, SidecarManifest, parse_sidecar
from teachercache.shards.source import remote_manifest
from teachercache.targets import StoredTargets, target_kind
from teachercache.targets.chunks import ChunkColumns
from teachercache.targets.columns import Column

CARD = "README.md"  # the one file without a digest: people may add to it
AnyManifest = Manifest | SidecarManifest
NOT_LISTED = "the manifest does not list it"
LEAVE_OUT = "delete it, unless you know where it comes from"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it."""

    file: str
    reason: str
    remedy: str


def verify(location: str | Path, *, quick: bool = False) -> list[Problem]:
    """Check the cache in a folder or at a URL; an empty list means that it is whole.

    `quick` compares sizes, schemas and counts without hashing. Raises `CacheError` when there is no finished cache, and for a
    URL what `ObjectStore.pieces` does.
    """
    try:
        if is_url(location):
            store = ObjectStore(str(location))
            return list(_wrong_objects(remote_manifest(store), store, quick=quick))
        folder = Path(location)
        manifest = read_manifest(folder)
    except CacheDamaged as error:
        return [Problem(MANIFEST, str(error), "fetch the cache again, or precompute it again")]
    found = [*_wrong_files(folder, manifest, quick=quick)]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if _is_file(path)}
    listed = {info.file for info in [*manifest.shards, *manifest.files]} | {MANIFEST, CARD}
    for name in [name for name in files if name.startswith(f"{ALIGNMENTS}/") and name.endswith(f"/{SIDECAR}")]:
        found += _wrong_alignment(folder, name, manifest, listed, quick=quick)
    return [*found, *(_unlisted(name) for name in files if name not in listed)]


def _is_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _unlisted(name: str) -> Problem:
    if name.startswith(f"{ALIGNMENTS}/"):
        folder = "/".join(name.split("/")[:2])
        return Problem(name, "no alignment lists it", f"finish it with `teachercache align`, or delete {folder}")
    return Problem(name, NOT_LISTED, LEAVE_OUT)


def _wrong_alignment(
    folder: Path, name: str, manifest: Manifest, listed: set[str], *, quick: bool
) -> Iterator[Problem]:
    """What is wrong with an alignment; adds its files to those that are listed."""
    remedy = "delete its folder and run `teachercache align` again"
    listed.add(name)
    try:
        sidecar = parse_sidecar(read_regular(folder, name, most=MOST_MANIFEST_BYTES), cache=manifest, name=name)
    except (CacheDamaged, CacheError, ValueError, OSError) as error:
        yield Problem(name, str(error), remedy)
        return
    for info in [*sidecar.shards, *sidecar.files]:
        listed.add(info.file)
        reason = _why_wrong(folder, info, sidecar, quick=quick)
        if reason:
            yield Problem(info.file, reason, remedy)


def _wrong_files(folder: Path, manifest: Manifest, *, quick: bool) -> Iterator[Problem]:
    for info in [*manifest.shards, *manifest.files]:
        reason = _why_wrong(folder, info, manifest, quick=quick)
        if reason:
            yield Problem(info.file, reason, "fetch this file again, or delete the cache and precompute it again")


def _wrong_objects(manifest: Manifest, store: ObjectStore, *, quick: bool) -> Iterator[Problem]:
    sizes = store.sizes()
    for info in [*manifest.shards, *manifest.files]:
        size = sizes.pop(info.file, None)
        if size is None:
            yield Problem(info.file, "it is missing", AGAIN)
        elif size != info.bytes:
            yield Problem(info.file, f"it holds {size} bytes, the manifest says {info.bytes}", AGAIN)
        elif not quick and (reason := _why_wrong_object(store, info, manifest)):
            yield Problem(info.file, reason, AGAIN)
    others = sizes.keys() - {MANIFEST, CARD}
    for name in sorted(name for name in others if name.startswith(f"{ALIGNMENTS}/") and name.endswith(f"/{SIDECAR}")):
        listed = {name}
        yield from _wrong_objects_of_alignment(store, name, manifest, sizes, listed, quick=quick)
        others -= listed
    yield from (_unlisted(name) for name in sorted(others))


def _wrong_objects_of_alignment(
    store: ObjectStore, name: str, manifest: Manifest, sizes: dict[str, int], listed: set[str], *, quick: bool
) -> Iterator[Problem]:
    try:
        sidecar = parse_sidecar(store.read(name, most=MOST_MANIFEST_BYTES), cache=manifest, name=name)
    except (CacheDamaged, CacheError) as error:
        yield Problem(name, str(error), AGAIN)
        return
    for info in [*sidecar.shards, *sidecar.files]:
        listed.add(info.file)
        size = sizes.get(info.file)
        if size != info.bytes:
            missing = "it is missing" if size is None else f"it holds {size} bytes, the alignment says {info.bytes}"
            yield Problem(info.file, missing, AGAIN)
        elif not quick and (reason := _why_wrong_object(store, info, sidecar)):
            yield Problem(info.file, reason, AGAIN)


def _why_wrong_object(store: ObjectStore, info: FileInfo, manifest: AnyManifest) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "copy"
        with path.open("wb") as stream:
            stream.writelines(store.pieces(info.file))
        return _why_wrong_file(path, info, manifest, quick=False)


def _why_wrong(folder: Path, info: FileInfo, manifest: AnyManifest, *, quick: bool) -> str | None:
    try:
        with open_regular(folder, info.file) as stream:
            return _why_wrong_file(path_of_open(stream), info, manifest, quick=quick)
    except FileNotFoundError:
        return "it is missing"
    except NoRegularFile as error:
        return str(error)


def _why_wrong_file(path: Path, info: FileInfo, manifest: AnyManifest, *, quick: bool) -> str | None:
    if path.stat().st_size != info.bytes:
        return f"it holds {path.stat().st_size} bytes, the manifest says {info.bytes}"
    if not quick and hash_file(path) != info.sha256:
        return "its sha256 differs from the manifest's: bytes are damaged or were changed"
    return _why_wrong_shard(path, info, manifest) if isinstance(info, ShardInfo) else None


def _why_wrong_shard(path: Path, info: ShardInfo, manifest: AnyManifest) -> str | None:
    try:
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
            fingerprint = shard_metadata(schema)["fingerprint"]
            check_schema(schema, [column.name for column in _columns(manifest)])
            rows, positions = _counts(source, schema)
    except (pa.ArrowException, OSError, CacheDamaged, KeyError, ValueError) as error:
        return f"it cannot be read as a shard: {str(error).splitlines()[0]}"
    if fingerprint != manifest.fingerprint:
        return "it belongs to another cache"
    if (rows, positions) != (info.rows, info.positions):
        return f"it holds {rows} rows and {positions} positions, the manifest says {info.rows} and {info.positions}"
    return None


def _columns(manifest: AnyManifest) -> tuple[Column, ...]:
    if isinstance(manifest, SidecarManifest):
        return ChunkColumns.columns
    kind = target_kind(manifest.logits, vocabulary_size=manifest.vocabulary_size)
    return StoredTargets.of(manifest.targets, kind).columns


def _counts(source: pa.MemoryMappedFile, schema: pa.Schema) -> tuple[int, int]:
    """Rows and positions, a batch at a time; raises `ValueError` for a batch that claims more memory than any has."""
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index("positions")])
    reader = pa.ipc.open_file(source, options=options)
    source.seek(0)
    blocks = Blocks(source.read_buffer())
    rows = positions = 0
    for number in range(reader.num_record_batches):
        claimed = blocks.decompressed_bytes(number)
        if claimed > MOST_BATCH_BYTES:
            raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
        counts = reader.get_batch(number).column("positions")
        counts.validate(full=True)
        rows, positions = rows + len(counts), positions + (pc.sum(counts).as_py() or 0)
    return rows, positions
