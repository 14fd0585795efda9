"""Earlier manifests of a cache, kept by name: `snapshots/FINGERPRINT/` has manifest.json and its index files, byte for byte.

The shards that an earlier manifest names are those of the cache: rows and targets are added beside them, and they stay as they
are. So who began with the cache as it was then, such as a run whose order follows from the fingerprint, goes on with that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from teachercache.cache.manifest.manifest import FEATURES, MANIFEST, commit_manifest, parse_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.stores.store import Store, holds
from teachercache.errors import CacheDamaged, CacheError

SNAPSHOTS = "snapshots"
_NAMED = re.compile(r"(?P<cache>.+)@(?P<snapshot>[0-9a-f]{12,64})")


def parted(location: str | Path) -> tuple[str | Path, str | None]:
    """A cache's location and, of `LOCATION@FINGERPRINT` (12 digits or more), the snapshot that it names. A folder that is
    really called so is no snapshot."""
    match = _NAMED.fullmatch(str(location))
    if match is None or Path(str(location)).exists():
        return location, None
    return type(location)(match["cache"]), match["snapshot"]


def named(location: str | Path, fingerprint: str) -> str:
    """The location of a cache as it was under this fingerprint."""
    return f"{parted(location)[0]}@{fingerprint}"


def read_snapshot(
    names: Iterable[str],
    read: Callable[[str], bytes | None],
    read_listed: Callable[[str, int], bytes],
    *,
    fingerprint: str,
    of: str,
    knows: frozenset[str] = FEATURES,
) -> Manifest:
    """The manifest whose fingerprint begins so, from the `names` of the files below `snapshots/` of the cache `of`, with what
    reads these.

    Raises `CacheError` where there is none, or more than one, `CacheDamaged` for one that cannot be trusted.
    """
    kept = sorted({name.split("/")[1] for name in names if name.count("/") >= 2 and name.endswith(f"/{MANIFEST}")})
    matching = [name for name in kept if name.startswith(fingerprint)]
    if len(matching) != 1:
        there = ", ".join(name[:12] for name in kept) or "none"
        raise CacheError(f"{of} keeps no manifest {fingerprint} (it keeps: {there}); leave out what stands after the @")
    within = f"{SNAPSHOTS}/{matching[0]}"
    name = f"{of}/{within}/{MANIFEST}"

    def text() -> bytes:
        data = read(f"{within}/{MANIFEST}")
        if data is None:
            raise CacheError(f"{name} is gone; leave out what stands after the @")
        return data

    manifest = parse_manifest(text, lambda file, size: read_listed(f"{within}/{file}", size), name=name, knows=knows)
    if manifest.fingerprint != matching[0]:
        raise CacheDamaged(
            f"{name} is of another cache (its fingerprint is {manifest.fingerprint[:12]}); delete {within}"
        )
    return manifest


def replace_manifest(manifest: Manifest, store: Store, *, before: Manifest) -> None:
    """Put a manifest in the place of the one before, which stays readable: under its name from now on, and as the cache's own
    until the new one is there."""
    keep_snapshot(store, before)
    commit_manifest(manifest, store)


def keep_snapshot(store: Store, manifest: Manifest) -> None:
    """Keep a cache's manifest, which is this one, under its fingerprint: the index files first."""
    within = f"{SNAPSHOTS}/{manifest.fingerprint}"
    if holds(store, f"{within}/{MANIFEST}"):
        return
    for name in (*(info.file for info in manifest.index), MANIFEST):
        store.put(f"{within}/{name}", store.get(name))
