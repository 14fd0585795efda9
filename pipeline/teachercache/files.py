"""Files that appear whole or not at all, and folders that one job at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from teachercache.errors import JobFailed

SOURCES = Path(__file__).parents[1]  # what the path of a process of our own needs to find this package
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of writes that a file system takes no bytes of, or a quota


def write_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file by temp file and rename: readers see the old content or the new one, never half. Of several writers the
    last one's stands, whole.

    With `durable` also after a power cut: it returns once the file has reached the disk, under its name, which takes a few ms
    on a local one; and temp files that killed writers of this file have left are removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):  # another writer has removed it, whose file stands after ours
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*tmp"):
            left.unlink(missing_ok=True)
        sync_folder(path.parent)


def is_temporary(name: str, *, of: str) -> bool:
    """Tells whether a file name is that of a temp file of `write_whole` for the file `of`."""
    return name.startswith(f".{of}.") and name.endswith("tmp")


@contextlib.contextmanager
def full_disk_in_a_line(folder: Path | str) -> Iterator[None]:
    """Raises `JobFailed` where the block finds no room on the disk of a folder, or in a quota."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise JobFailed(
            f"there is no room for {folder} ({error.strerror}); what is finished is kept: make room and run the same command "
            "again to go on"
        ) from None


def sync_files(folder: Path) -> None:
    """Return once the bytes of all files in a folder, and below it, have reached the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)


def sync(path: Path) -> None:
    """Return once the bytes of a file have reached the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names of a folder's files have reached the disk; some file systems cannot say."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, job: str, folder: Path) -> Iterator[None]:
    """Hold the lock file `path`, so that a second job stays out, also one whose launcher was killed and which still runs.

    The lock belongs to this process alone and ends with it, however it ends; the file goes when the block ends, and one that a
    killed process left is taken over. Raises `JobFailed` where it is taken, naming the kind of `job` that holds it and the
    `folder` that it writes to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("w")
    try:
        while (is_held := _lock(stream, job=job, folder=folder)) and not _is_at(path, stream.fileno()):
            stream.close()  # its last holder removed it after we had opened it: that was a lock on nothing
            stream = path.open("w")
        try:
            yield
        finally:
            if is_held:  # and still is: whoever locks the removed file sees that it is gone, and begins anew
                path.unlink(missing_ok=True)
    finally:
        stream.close()


def _lock(stream: IO[str], *, job: str, folder: Path) -> bool:
    """Takes the lock; False where the file system has no locks."""
    try:
        # POSIX locks, unlike flock, are not inherited by child processes, which may outlive a killed job.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JobFailed(f"another {job} is writing to {folder}; wait for it or stop it") from None
    except OSError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def same_imports() -> dict[str, str]:
    """Environment in which a process of our own finds this very package, also where it is not installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])}
