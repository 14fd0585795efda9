"""Files for libraries that know folders alone: from a folder into a store, and from a store into a folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from teachercache.cache.files.entries import FileInfo
from teachercache.cache.stores.named import put_listed
from teachercache.cache.stores.store import Store


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process alone, which goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
        yield Path(folder)


def put_folder(store: Store, folder: Path, within: str) -> list[FileInfo]:
    """Write all files of a folder, and of those below it, to the folder `within` of a store, in order of their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [put_listed(store, f"{within}/{path.relative_to(folder).as_posix()}", path.read_bytes()) for path in paths]


@contextlib.contextmanager
def folder_of(store: Store, within: str) -> Iterator[Path]:
    """While it is open, a folder of this process alone with copies of what is below `within` in a store, as it is now."""
    with scratch_folder() as folder:
        for name in store.list(f"{within}/"):
            path = folder / name.removeprefix(f"{within}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(name))
        yield folder


@contextlib.contextmanager
def file_of(store: Store, name: str) -> Iterator[Path]:
    """While it is open, a copy of one file, under its own name. Raises `FileNotFoundError` where there is none."""
    with scratch_folder() as folder:
        path = folder / name.rpartition("/")[2]
        path.write_bytes(store.get(name))
        yield path
