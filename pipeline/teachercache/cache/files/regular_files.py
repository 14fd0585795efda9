"""Opening files of a cache that somebody else may have made: regular files below its folder, and nothing else.

A link could bring in any file of this machine, a pipe never ends to wait, a device never ends to read. So each part of a
name is opened by itself, below the part before it and without following links, and what is opened is looked at before a
byte is read. The cache's folder itself may be a link: who names it chose it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath

from teachercache.errors import CacheDamaged, CacheError

NO_FILE = "it is no regular file (but a link, a device, a pipe or a folder), or lies behind a link"
COPY_AGAIN = "copy the cache again as plain files (`cp -rL`, `rsync -L`)"
MOST_MANIFEST_BYTES = 2**25  # of manifest.json and of alignment.json; 100,000 shards take 25 MB
_OTHER = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV)  # links, sockets, devices that are not there
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class NoRegularFile(ValueError):
    """Raised where a name leads to something that is not a regular file of the folder."""

    def __init__(self) -> None:
        super().__init__(NO_FILE)


def open_regular(folder: Path, name: str) -> BufferedReader:
    """Open the regular file `name`, a relative path with `/`, of a folder.

    Raises `FileNotFoundError` where there is none, `NoRegularFile` where it is something else or its name leads outside.
    """
    *parents, last = PurePosixPath(name).parts
    if ".." in (*parents, last) or PurePosixPath(name).is_absolute():
        raise NoRegularFile
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parents:
        descriptor = _below(descriptor, part, os.O_DIRECTORY)
    descriptor = _below(descriptor, last, os.O_NONBLOCK)  # else opening a pipe waits for who writes to it
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoRegularFile
    return os.fdopen(descriptor, "rb")


def _below(parent: int, name: str, flags: int) -> int:
    """Open an entry of an open folder, which is closed."""
    try:
        return os.open(name, _FLAGS | flags, dir_fd=parent)
    except OSError as error:
        if error.errno in _OTHER:
            raise NoRegularFile from None
        raise
    finally:
        os.close(parent)


def read_regular(folder: Path, name: str, *, most: int) -> bytes:
    """The content of a small file. Raises as `open_regular` does, and `ValueError` when it is larger than `most` bytes."""
    with open_regular(folder, name) as stream:
        return read_at_most(stream, most)


def read_at_most(stream: BufferedReader, most: int) -> bytes:
    """The rest of an open file. Raises `ValueError` when that is more than `most` bytes, before it takes their memory."""
    size = os.fstat(stream.fileno()).st_size
    data = stream.read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise ValueError(f"it holds {max(size, len(data))} bytes, at most {most} are possible")
    return data


def why_different(stream: BufferedReader, *, expected_bytes: int, sha256: str | None) -> str | None:
    """Returns the reason why an open file has not the size and digest that a manifest promises; None where it has.
    Without a `sha256` only its size is compared. sha256 runs at about 1.4 GB/s."""
    size = os.fstat(stream.fileno()).st_size
    if size != expected_bytes:
        return f"holds {size} bytes, the manifest says {expected_bytes}"
    stream.seek(0)
    if sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
        return "differs from its sha256 in the manifest (damaged bytes)"
    stream.seek(0)
    return None


@contextmanager
def refused_in_a_line(place: str, *, remedy: str) -> Iterator[None]:
    """While it is open, a file that is missing or no regular one is `CacheDamaged`, which names `place` and the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise CacheDamaged(f"{place} is missing; {remedy}") from None
    except NoRegularFile as error:
        raise CacheDamaged(f"{place} is refused: {error}; {COPY_AGAIN}, or {remedy}") from None
    except OSError as error:
        raise CacheError(f"{place} cannot be read: {error.strerror}; check its permissions, or {remedy}") from None


def path_of_open(stream: BufferedReader) -> Path:
    """A path of an open file that no rename can turn into another file, for libraries that open files by themselves."""
    return Path(f"/dev/fd/{stream.fileno()}")
