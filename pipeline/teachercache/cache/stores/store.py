"""`Store`: the verbs by which everything that writes a cache writes it.

    put             a whole object, in place of one that may be there
    put_if_absent   a whole object where there is none: of several writers exactly one is told that it wrote
    get             the bytes of an object
    list            names below a prefix, with sizes
    delete          remove objects
    sweep           remove what writers left that were killed: it is no object

Names are relative, with `/`, as manifests hold them. An object appears whole or not at all, and a verb that returns has
reached the disk, or the store's servers: what a job writes next may rely on it, also after a power cut. Two writers never
meet in one object, and what a killed writer leaves is none.
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import Buffer

from teachercache.cache.files.regular_files import NoRegularFile


class Store(Protocol):
    """Objects of one cache, by name. Equal stores are of the same place; picklable."""

    def __hash__(self) -> int:
        """Equal stores have equal hashes."""

    @property
    def name(self) -> str:
        """The name by which messages call it."""

    def put(self, name: str, data: Buffer) -> None:
        """Write a whole object; one of this name that was there stays readable until then, and is gone after."""

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write a whole object unless there is one of this name; True where this call wrote it. Of several writers at the same
        time exactly one gets True, and its bytes stay."""

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises `FileNotFoundError` where there is none."""

    def list(self, prefix: str = "") -> dict[str, int]:
        """Names that begin with `prefix`, in order, as they are now, each with its bytes."""

    def delete(self, *names: str) -> None:
        """Remove objects; nothing happens where there is none."""

    def sweep(self, prefix: str = "") -> None:
        """Remove what killed writers left where names begin with `prefix`. A writer that is still at work there fails."""


def place(store: Store, name: str) -> str:
    """Returns what messages call an object."""
    return f"{store.name}/{name}"


def holds(store: Store, name: str) -> bool:
    """Tells whether there is a small object of this name: it is fetched, which costs less than to list what is beside it."""
    try:
        store.get(name)
    except (FileNotFoundError, NoRegularFile):
        return False
    return True
