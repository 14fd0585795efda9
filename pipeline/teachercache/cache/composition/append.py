"""Rows added to a cache in place: the shards of another one after its own, which stay where they are.

The manifest of before is kept under its name (manifest/snapshots.py); until the new one is there it is the cache's own.
"""

from __future__ import annotations

from collections.abc import Callable

from teachercache.cache.composition.compatible import check_compatible
from teachercache.cache.composition.description import composed, files_of_teacher, merged_audit, sources_of
from teachercache.cache.composition.folder import quarantine_files
from teachercache.cache.composition.placing import Placed, place
from teachercache.cache.composition.row_facts import Windows
from teachercache.cache.composition.selection import Part
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.reader import Cache


def appended(
    cache: Cache, added: Cache, placed_one: Callable[[], None], *, by: str, source: str | None = None
) -> Manifest:
    """Put the shards of a cache beside those of another one in its folder; returns the manifest of both, which is not written
    yet. The caller knows that no row is in both; `source` names the corpus of the new ones (default: as their cache does).

    Raises `CacheError` where their shards may not stand in one cache.
    """
    ours, theirs = cache.manifest, added.manifest
    check_compatible(ours, theirs, name=cache.name, of=added.name)
    placed = [Placed(shard, {}, "kept") for shard in ours.shards]
    for shard in range(len(theirs.shards)):
        placed.append(place([added], Part(0, shard), cache.folder, len(placed)))
        placed_one()
    first = len(ours.files) - len(files_of_teacher(ours))
    files = [*ours.files, *quarantine_files(added, cache.folder, first=first)]
    placed[0] = Placed(placed[0].shard, ours.column_bytes, "kept")  # of all that were there
    return composed(
        [ours, theirs],
        placed,
        audit=merged_audit([ours, theirs], Windows()),
        files=files,
        sources=[*sources_of(ours), *(source or each for each in sources_of(theirs))],
        described=[{"fingerprint": manifest.fingerprint, "by": by} for manifest in (ours, theirs)],
        is_whole=True,
    )
