"""The store of a cache's location."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from teachercache.cache.stores.local import LocalStore
from teachercache.cache.stores.object_store import ObjectStore
from teachercache.cache.stores.store import Store
from teachercache.config import is_url


def store_at(location: str | Path) -> Store:
    """The store that a cache is written to: a folder, or what is below a URL."""
    return ObjectStore(str(location)) if is_url(location) else LocalStore(Path(location))


def store_beside(location: str | Path) -> tuple[Store, str] | None:
    """The store of what stands beside a cache, and the cache's own name in it; None for a whole bucket."""
    if not is_url(location):
        folder = Path(location)
        return LocalStore(folder.parent), folder.name
    parts = urlsplit(str(location))
    above, _, name = parts.path.rstrip("/").rpartition("/")
    return (ObjectStore(urlunsplit(parts._replace(path=above))), name) if name else None
