"""Lists of what lies in a folder that somebody else may have filled: however deep, and however much."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from teachercache.cache.files.entries import MOST_NAME

MOST_FILES = 2**22  # of a cache; half a million shards of two groups are a quarter of that


def files_below(folder: Path, within: str = "") -> dict[str, int]:
    """Size of everything but folders below `folder`, or its folder `within`, by name from `folder` on, in order; -1 of what is
    no regular file.

    A folder that no file of a cache can lie in, because its name alone is too long, is listed itself, with -1, and not
    looked into. Raises `ValueError` for more files than a cache has.
    """
    sizes: dict[str, int] = {}
    waiting = [within]
    while waiting:
        for entry, name in _entries(folder, waiting.pop()):
            if entry.is_dir(follow_symlinks=False) and len(name) <= MOST_NAME:
                waiting.append(name)
            else:
                sizes[name] = entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
        if len(sizes) > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES} files")
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: name.split("/"))}


def walked(top: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields as `os.walk` does, which goes into itself for each folder: each folder with the names of its folders, of
    which the caller may take some out, and of its files. No link is followed; too long names are left out as above."""
    waiting = [top]
    while waiting:
        parent = waiting.pop()
        for _, folders, files in itertools.islice(os.walk(parent), 1):
            yield parent, folders, files
            inner = (parent / name for name in folders)
            waiting += [path for path in inner if len(str(path)) - len(str(top)) <= MOST_NAME and not path.is_symlink()]


def _entries(folder: Path, within: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError),
        os.scandir(folder / within) as found,
    ):
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # removed since
                yield entry, f"{within}/{entry.name}" if within else entry.name
