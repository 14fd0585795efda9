"""A full disk, in whatever words a library puts it, to one readable line."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from teachercache.errors import JobFailed, TeachercacheError
from teachercache.files import DISK_FULL

_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    # torch's own writer of files only notices that the system took no more bytes.
    "pytorchstreamwriter failed writing",
    "unexpected pos",
    "basic_ios::clear: iostream error",
)


def out_of_space(error: BaseException) -> bool:
    """Tells whether an error, or its cause, says that a file system took no more bytes.

    The system calls say it by number; safetensors and torch's legacy writer wrap them in their own errors, in words.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL:
            return True
        words = str(seen).lower()
        # Not /dev/shm, through which loader workers hand over batches.
        if any(known in words for known in _WORDS) and "shared memory" not in words and "/torch_" not in words:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def space_error(folder: Path) -> JobFailed:
    """The line for it, of a job that writes to `folder`."""
    exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_mb = shutil.disk_usage(exists).free / 1e6
    return JobFailed(
        f"{folder}: its disk takes no more, the space or a quota is used up ({free_mb:,.1f} MB free); free some and run "
        "the same command again: it goes on from the last whole checkpoint"
    )


@contextlib.contextmanager
def full_disk_in_a_line(folder: Path) -> Iterator[None]:
    """While it is open, a full disk ends the job that writes to `folder` as `JobFailed`; other errors pass."""
    try:
        yield
    except TeachercacheError:
        raise
    except Exception as error:
        if out_of_space(error):
            raise space_error(folder) from error
        raise
