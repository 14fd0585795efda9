"""Files that are named by their content: hashed while they are written, never read back."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from teachercache.cache.files.digests import NAME_DIGITS
from teachercache.cache.files.entries import FileInfo


def write_named(folder: Path, within: str, stem: str, suffix: str, data: bytes) -> FileInfo:
    """Write a whole file of a cache; see `NamedByContent`."""
    with NamedByContent(folder, within, stem, suffix) as sink:
        sink.write(data)
    return sink.info


class NamedByContent:
    """A file that is hashed while it is written and then appears, whole, as `STEM-<12 digits of its sha256>SUFFIX` in
    `folder/within`; `info` says which. What an attempt leaves behind that failed has a name of its own and is removed."""

    def __init__(self, folder: Path, within: str, stem: str, suffix: str) -> None:
        self._within, self._stem, self._suffix = within, stem, suffix
        self._folder = folder / within
        self._temporary = self._folder / f".{stem}.{uuid.uuid4().hex}.tmp"
        self._digest, self._bytes = hashlib.sha256(), 0
        self._stream: BinaryIO

    @property
    def info(self) -> FileInfo:
        """The finished file."""
        return FileInfo(f"{self._within}/{self._name}", self._bytes, self._digest.hexdigest())

    @property
    def _name(self) -> str:
        return f"{self._stem}-{self._digest.hexdigest()[:NAME_DIGITS]}{self._suffix}"

    def write(self, data: Any) -> int:
        """Append bytes, or anything that has a buffer of them."""
        self._digest.update(data)
        written = self._stream.write(data)
        self._bytes += written
        return written

    def flush(self) -> None:
        """For Arrow, which asks for it."""
        self._stream.flush()

    @property
    def closed(self) -> bool:
        """For Arrow, which asks for it."""
        return self._stream.closed

    def __enter__(self) -> NamedByContent:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._temporary.open("wb")
        return self

    def __exit__(self, failed: Any, *rest: object) -> None:
        try:
            with self._stream:
                if failed is None:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())  # a record that follows must not reach the disk before the file
            if failed is None:
                self._temporary.replace(self._folder / self._name)
        finally:
            self._temporary.unlink(missing_ok=True)
