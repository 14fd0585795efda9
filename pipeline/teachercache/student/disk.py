"""A full disk, in whatever words a library puts it, to one readable line."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from teachercache.errors import JobFailed

_FULL = {errno.ENOSPC, errno.EDQUOT}
_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    # torch's own writer of files does not say why the system took no more bytes.
    "pytorchstreamwriter failed writing",
    "file write failed",
    "unexpected pos",
)


def out_of_space(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that a file system took no more bytes.

    The system calls say it by number; safetensors and torch's legacy writer wrap them in their own errors, in words.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        words = str(seen).lower()
        # Not /dev/shm, through which loader workers hand over batches.
        if any(known in words for known in _WORDS) and "shared memory" not in words and "/torch_" not in words:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def space_error(error: BaseException, *, folder: Path) -> JobFailed:
    """The line for an error that `out_of_space`, of a job that writes to `folder`."""
    free_mb = shutil.disk_usage(folder).free / 1e6
    return JobFailed(
        f"{folder}: no space left on its disk, or its quota is used up ({free_mb:,.0f} MB free; {_first_line(error)}); "
        "free some and run the same command again: it goes on from the last whole checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
