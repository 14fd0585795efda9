"""A manifest that is lost or damaged, put back.

Index files list a cache's shards, and shards say which settings they are of; but who the teacher was, what the targets mean,
the corpus's digest and the audit stand in manifest.json alone. So it comes back from a copy, as `snapshots/` keeps them, or
from the records of the job that wrote it, while these are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from teachercache.cache.files.regular_files import MOST_MANIFEST_BYTES, read_regular
from teachercache.cache.manifest.manifest import MANIFEST, WORK_FOLDER, parse_manifest, read_listed, read_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.manifest.snapshots import SNAPSHOTS
from teachercache.cache.stores.local import LocalStore
from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError


def repair_manifest(location: str | Path) -> str:
    """Put back manifest.json of the cache in a folder, if it is missing or damaged; returns what was done, in a line.

    Of several copies whose files are all there the one with the most rows is taken. Raises `CacheDamaged` where there is none,
    and says what is missing, `CacheError` where there is no cache, or not in a folder.
    """
    if is_url(location):
        raise CacheError(f"{location} is in an object store, and --repair works on a folder: copy the cache into one")
    folder = Path(location)
    if _is_whole(folder):
        return f"{MANIFEST} is as it was written: there is nothing to repair in it"
    store = LocalStore(folder)
    copies = sorted(_copies(folder, store), key=lambda copy: copy[1].rows)
    if copies:
        within, manifest = copies[-1]
        for name in (*(info.file for info in manifest.index), MANIFEST):
            store.put(name, store.get(f"{within}/{name}"))
        return (
            f"{MANIFEST} is again that of {within}, of {manifest.rows:,} rows; rows that were added since are not in it"
        )
    if (folder / WORK_FOLDER / "plan.json").is_file():
        store.delete(MANIFEST)
        return f"the job that writes {folder} left its records: run `teachercache precompute` with its recipe again"
    shards = sum(1 for _ in (folder / "shards").glob("part-*"))
    raise CacheDamaged(
        f"{folder / MANIFEST} cannot be made of what is there: {shards} shards and their index, but teacher, targets, corpus "
        f"and audit stood in it alone, and {SNAPSHOTS}/ keeps no copy; fetch it again, or precompute the cache again"
    )


def _is_whole(folder: Path) -> bool:
    """Raises `CacheError` for a manifest of a version that this one cannot read."""
    try:
        read_manifest(folder)
    except CacheDamaged:
        return False
    except CacheError:
        if (folder / MANIFEST).is_file() or not folder.is_dir():
            raise
        return False
    return True


def _copies(folder: Path, store: LocalStore) -> Iterator[tuple[str, Manifest]]:
    """Manifests below `snapshots/`, by their folders, whose files are all there in full."""
    sizes = store.list()
    for name in [name for name in sizes if name.startswith(f"{SNAPSHOTS}/") and name.count("/") == 2]:
        within = name.removesuffix(f"/{MANIFEST}")
        read = partial(read_regular, folder, name, most=MOST_MANIFEST_BYTES)
        try:
            manifest = parse_manifest(read, partial(_listed, folder, within), name=str(folder / name))
        except (CacheDamaged, CacheError):
            continue
        indexed = {info.file for info in manifest.index}
        if all(info.file in indexed or sizes.get(info.file) == info.bytes for info in manifest.all_files):
            yield within, manifest


def _listed(folder: Path, within: str, file: str, size: int) -> bytes:
    return read_listed(folder, f"{within}/{file}", size)
