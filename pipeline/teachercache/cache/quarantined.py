"""Windows without targets by their places in their documents, as quarantine/ has them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from teachercache.bounded.strangers_json import parse_json
from teachercache.cache.manifest.manifest import read_listed
from teachercache.cache.manifest.model import QUARANTINE, Manifest
from teachercache.cache.storage.source import read_listed_object
from teachercache.cache.stores.object_store import ObjectStore
from teachercache.config import is_url
from teachercache.errors import CacheDamaged

MOST_FILES = 256  # read at most
MOST_BYTES = 2**24  # of a file
KEYS = ("source_id", "occurrence", "byte_start", "byte_end", "reason")


def lost_windows(location: str | Path, manifest: Manifest, *, most: int) -> list[dict[str, Any]]:
    """Reads the first `most` windows that the teacher gave no targets for: `source_id`, `occurrence`, `byte_start` and
    `byte_end` in the document, and `reason`. Raises `CacheDamaged` for a file that holds something else.

    Documents are in order, also those of which every window was lost. Caches of earlier versions have no places.
    """
    if not manifest.audit.windows_quarantined:
        return []
    return list(islice(_windows(location, manifest), most))


def _windows(location: str | Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    infos = (info for info in manifest.files if info.file.startswith(f"{QUARANTINE}/") and info.bytes <= MOST_BYTES)
    for info in islice(infos, MOST_FILES):
        if is_url(location):
            data = read_listed_object(ObjectStore(str(location)), info.file, info.bytes)
        else:
            data = read_listed(Path(location), info.file, info.bytes)
        for line in data.splitlines():
            try:
                said = parse_json(line)
                if "byte_start" in said:
                    yield {key: said[key] for key in KEYS}
            except (ValueError, KeyError, TypeError) as error:
                raise CacheDamaged(f"{info.file} has a line that names nothing that was lost: {error}") from error
