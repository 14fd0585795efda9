"""`LocalStore`: a folder, by the verbs of `Store`.

Each write has a temporary file of its own, which is synced and then renamed or linked. The folder is synced as well, and so
are folders that had to be made for it: a file is only as safe as the names that lead to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from typing_extensions import Buffer

from teachercache.cache.files.entries import check_inside
from teachercache.cache.files.listing import walked
from teachercache.cache.files.regular_files import open_regular
from teachercache.errors import CacheError
from teachercache.files import sync_folder

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what link() says on FAT and on some network file systems
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_ATTEMPTS = 5  # at a folder that others remove as soon as it is empty


@dataclass(frozen=True)
class LocalStore:
    """Objects are the regular files of a folder, which is made when it is first written to; folders in it that hold nothing go.

    Raises `ValueError` for a name that leads outside the folder, `NoRegularFile` where a name to read is a link or a device,
    `CacheError` where a link would lead what is written out of it, or where the file system cannot put if absent, and otherwise
    `OSError` as it does.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        return LocalStore, (
            self.folder.absolute(),
        )  # workers have a folder of their own, which relative paths begin at

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

    def list(self, prefix: str = "") -> dict[str, int]:
        """Looks through the folder that the prefix names, and those below it. A link to a file is listed, and none is
        followed."""
        sizes = {}
        for name, path in sorted(self._found(prefix)):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                if not _TEMPORARY.fullmatch(path.name):
                    sizes[name] = path.lstat().st_size
        return sizes

    def delete(self, *names: str) -> None:
        """Removes the names and the folders that are empty then, and says so to the disk once a folder."""
        paths = [self._path(name) for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)
                self._prune(folder)

    def sweep(self, prefix: str = "") -> None:
        """Removes temporary files, and folders without files."""
        for _, path in self._found(prefix):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)
        for parent in reversed([parent for parent, _, _ in walked(self._top(prefix))]):  # inner ones first
            self._prune(parent)

    def _top(self, prefix: str) -> Path:
        """The folder that holds what begins with a prefix."""
        return self._path(f"{prefix.rpartition('/')[0]}/x").parent if "/" in prefix else self.folder

    def _found(self, prefix: str) -> Iterator[tuple[str, Path]]:
        top, begins = self._top(prefix), prefix.rpartition("/")[2]
        for parent, folders, files in walked(top):
            if parent == top:
                folders[:] = [name for name in folders if name.startswith(begins)]
            for each in [*files, *(name for name in folders if (parent / name).is_symlink())]:
                path = parent / each
                name = path.relative_to(self.folder).as_posix()
                if name.startswith(prefix):
                    yield name, path

    def _path(self, name: str) -> Path:
        """The path of a name, where no link leads away from it."""
        check_inside(name)
        path = self.folder / name
        for parent in [path, *path.parents][1 : len(PurePosixPath(name).parts)]:
            if parent.is_symlink():
                raise CacheError(f"{parent} is a link, which would lead what is written out of the cache; delete it")
        return path

    @contextlib.contextmanager
    def _written(self, name: str, data: Buffer) -> Iterator[tuple[Path, Path]]:
        """A temporary file with these bytes, on the disk, and the path that is to become its name; afterwards the names of the
        folder are on the disk, too, and the temporary file is gone."""
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with _opened(temporary) as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield temporary, path
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # of an object that somebody has deleted since
            sync_folder(path.parent)

    def _prune(self, folder: Path) -> None:
        """Remove a folder and those above it while they are empty; the store's own stays."""
        while folder != self.folder:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _opened(file: Path) -> BinaryIO:
    """A new file, open for writing, with the folders above it."""
    for left in reversed(range(_ATTEMPTS)):
        _make_folder(file.parent)
        try:
            return file.open("xb")
        except FileNotFoundError:  # somebody has just removed the last file of the folder, and the folder with it
            if not left:
                raise
    raise AssertionError


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, and say so to the disk."""
    for left in reversed(range(_ATTEMPTS)):
        if folder.is_dir():
            return
        _make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
            return
        except FileNotFoundError:
            if not left:
                raise
