"""A process that opens caches which may be hostile, each in a fork of itself under the kernel's limits.

    python forgery_server.py WHOLE_CACHE      a folder a line on stdin, a JSON line for each on stdout

Everything that readers import is imported before; a fork may take `MEMORY` bytes of address space and `SECONDS` of processor
time above what it begins with. It says what each way to read the cache came to, and what it wrote or ran on the way.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.forgery import read_everything
from teachercache.cache import Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.console import run_command
from teachercache.precompute.align.turns import turn_end
from teachercache.stream.tokenizers import student_tokenizer, teacher_tokenizer
from teachercache.training.job import train  # noqa: F401 - what a training job imports

MEMORY = 3 * 2**29
SECONDS = 10


def read(folder: Path) -> dict[str, Any]:
    """All that training and alignment read before and while they run: settings, tokenizers, templates, alignments, rows."""
    cache = Cache.open(folder)
    _ = cache.targets, cache.boundary
    tokenizer = teacher_tokenizer(cache)
    if tokenizer.chat_template:
        turn_end(tokenizer)
    for alignment in CacheAlignment.all_of(cache):
        _ = alignment.vocabulary, alignment.begins_V
        student_tokenizer(alignment)
        for index in range(alignment.rows_of("train")):
            alignment.read_row("train", index)
    read_everything(folder)
    return {}


def verified(folder: Path) -> dict[str, Any]:
    """Problems that `verify --deep` finds."""
    return {"problems": [f"{problem.file}: {problem.reason}" for problem in verify(folder, deep=True)]}


def _limited(work: Callable[[Path], dict[str, Any]], folder: Path, sink: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS + 1,) * 2)
    signal.alarm(30 * SECONDS)  # of a pipe that nobody writes to, on a busy machine too
    noted: list[str] = []
    sys.addaudithook(lambda event, details: _note(event, details, noted))
    found: list[dict[str, Any]] = []

    def run(_: Any) -> dict[str, Any]:
        found.append(work(folder))
        return found[0]

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        status = run_command(run, as_json=True, show=lambda result: None)
        printed.seek(0)
        said = json.loads(printed.read().splitlines()[-1])
    foreign = [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]
    result = {"status": status, **said, "noted": noted + foreign}
    os.write(sink, json.dumps(result).encode())


def _note(event: str, details: Any, noted: list[str]) -> None:
    """Writes outside the folder for temporary files, and programs other than our own child."""
    if event == "open" and isinstance(details[0], str) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not details[0].startswith((tempfile.gettempdir(), "/dev/")):
            noted.append(f"writes {details[0]}")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "shutil.rmtree", "os.remove"):
        place = str(details[0])
        if event not in ("shutil.rmtree", "os.remove") or not _is_temporary(place, details):
            noted.append(f"{event} {place}")
    elif event == "subprocess.Popen" and "teachercache.bounded.child" not in str(details[1]):
        noted.append(f"runs {details[1]}")


def _is_temporary(place: str, details: Any) -> bool:
    return place.startswith(tempfile.gettempdir()) or details[1] not in (-1, None)  # below an open folder


def forked(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The result of `work` in a fork: its exit status and JSON, or the signal that ended it."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(source)
        try:
            _limited(work, folder, sink)
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        data = stream.read()
    _, ended, usage = os.wait4(pid, 0)
    seconds = round(usage.ru_utime + usage.ru_stime, 2)
    return {**(json.loads(data) if data else {"ended": ended}), "seconds": seconds, "peak": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    teacher_tokenizer(Cache.open(sys.argv[1]))  # what is imported when it is needed
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in sys.stdin:
        name = Path(line.rstrip("\n"))
        answer = {"own": own, "verify": forked(verified, name), "read": forked(read, name)}
        print(json.dumps(answer), flush=True)
