"""`Store`: five verbs for writing a cache, by which records of units are written, and `LocalStore`, a folder that speaks them.

    put             a whole object, in place of one that may be there
    put_if_absent   a whole object where there is none: of several writers exactly one is told that it wrote
    get             the bytes of an object
    list            names below a prefix
    delete          remove an object

Names are relative, with `/`, as manifests hold them. An object appears whole or not at all, and a verb that returns has
reached the disk: what a job writes next may rely on it, also after a power cut. Each write has a temporary name of its own,
so two writers never meet in one file; what a killed writer leaves is no object, and `list` does not show it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from typing_extensions import Buffer

from teachercache.cache.files.entries import check_inside
from teachercache.cache.files.regular_files import open_regular
from teachercache.errors import CacheError
from teachercache.files import sync_folder

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what link() says on FAT and on some network file systems
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


class Store(Protocol):
    """Objects of one cache, by name."""

    name: str  # what messages call it

    def put(self, name: str, data: Buffer) -> None:
        """Write a whole object; one of this name that was there stays readable until then, and is gone after."""

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write a whole object unless there is one of this name; True where this call wrote it. Of several writers at the same
        time exactly one gets True, and its bytes stay."""

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises `FileNotFoundError` where there is none."""

    def list(self, prefix: str = "") -> list[str]:
        """Names that begin with `prefix`, in order, as they are now."""

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""


class LocalStore:
    """Objects are the regular files of a folder, which is made when it is first written to. Picklable, holds no state.

    Raises `ValueError` for a name that leads outside the folder, `NoRegularFile` where a name to read is a link or a device,
    `CacheError` where the file system cannot put if absent, and otherwise `OSError` as it does.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)

    def put(self, name: str, data: Buffer) -> None:
        """Temp file, fsync, rename."""
        with self._written(name, data) as (temporary, path):
            temporary.replace(path)

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Temp file, fsync, hard link: the file system refuses a second link of the name."""
        with self._written(name, data) as (temporary, path):
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise CacheError(
                    f"{self.folder} is on a file system without hard links, by which one of several writers wins; choose a "
                    "folder on another one"
                ) from None
        return True

    def get(self, name: str) -> bytes:
        """Reads the file; a link is not followed."""
        check_inside(name)
        with open_regular(self.folder, name) as stream:
            return stream.read()

    def list(self, prefix: str = "") -> list[str]:
        """Looks through the folder that the prefix names, and those below it."""
        top = self.folder / prefix.rpartition("/")[0]
        files = (path for path in top.rglob("*") if path.is_symlink() or not path.is_dir())
        names = (path.relative_to(self.folder).as_posix() for path in files if not _TEMPORARY.fullmatch(path.name))
        return sorted(name for name in names if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Removes the name, then says so to the disk."""
        check_inside(name)
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    @contextlib.contextmanager
    def _written(self, name: str, data: Buffer) -> Iterator[tuple[Path, Path]]:
        """A temporary file with these bytes, on the disk, and the path that is to become its name; afterwards the names of the
        folder are on the disk, too, and the temporary file is gone."""
        check_inside(name)
        path = self.folder / name
        _make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield temporary, path
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, and say so to the disk: a file is only as safe as the names that lead to it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
