"""Speed and memory of a cache put into one file, and taken out of it, beside tar and the zstd tool.

    python tests/bench/pack_speed.py WORK_FOLDER [--megabytes 1024] [--level 3] [--threads 2] [--rounds 3] [--out FILE] [--json]

A synthetic cache (synthetic_cache.py, kind `sketch`) whose shards are linked until it has that size. In turns, each in a
process of its own: `pack`, which hashes every file on the way, and `tar | zstd` at the same level with as many threads, which
does not; `unpack`, which hashes too, and `zstd -d | tar`. Medians of the seconds, of the ratios of speeds within each round
(ours over theirs), and the largest memory of our processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import add_output_options, provenance, publish

ROWS = 2048


def made(work: Path, megabytes: int) -> Path:
    """The cache, made by a process of its own: what this one takes would count as memory of those that it starts. Its shards
    are the same bytes under many names, which no window of zstd reaches back to."""
    cache = work / "large"
    if not (cache / "manifest.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        subprocess.run([sys.executable, __file__, str(work), "--megabytes", str(megabytes), "--make"], check=True)
    return cache


def make(work: Path, megabytes: int) -> None:
    """Write it."""
    from open_cache import multiply
    from synthetic_cache import sketch_cache

    small = work / "small"
    sketch_cache(small, count=ROWS, length=256)
    shards = list((small / "shards").glob("*.arrow"))
    multiply(
        small, work / "large", max(1, megabytes * 10**6 * len(shards) // sum(path.stat().st_size for path in shards))
    )


@dataclass(frozen=True)
class Cost:
    """Cost of a command: seconds on the clock and of the processor, and bytes of memory of its largest process."""

    clock: float
    processor: float
    peak: int

    @classmethod
    def of(cls, command: list[str] | str) -> Cost:
        """Run it."""
        began = time.perf_counter()
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, shell=isinstance(command, str), stdout=null, stderr=null)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
        return cls(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def ours(*arguments: str) -> list[str]:
    """One of our commands."""
    return [sys.executable, "-m", "teachercache", *arguments]


def measure(work: Path, *, megabytes: int, level: int, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds, ratios and memory."""
    cache = made(work, megabytes)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    archive, theirs, out = work / "ours.tar.zst", work / "theirs.tar.zst", work / "out"
    commands = {
        "pack": (
            ours("pack", str(cache), str(archive), "--level", str(level), "--threads", str(threads)),
            f"tar -C {cache} --hard-dereference -cf - . | zstd -q -f --check -{level} -T{threads} -o {theirs} && sync {theirs}",
        ),
        "unpack": (
            ours("unpack", str(archive), str(out)),
            f"mkdir {out} && zstd -q -d -c {theirs} | tar -C {out} -xf - && sync -f {out}",
        ),
    }
    costs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for path in (archive, theirs):
            path.unlink(missing_ok=True)
        for name, pair in commands.items():
            taken = []
            for command in pair:
                shutil.rmtree(out, ignore_errors=True)
                taken.append(Cost.of(command))
            costs[name].append((taken[0], taken[1]))
    return {
        "bytes": size,
        "archive_bytes": {"ours": archive.stat().st_size, "tools": theirs.stat().st_size},
        **{name: _summed_up(pairs) for name, pairs in costs.items()},
    }


def _summed_up(pairs: list[tuple[Cost, Cost]]) -> dict[str, Any]:
    return {
        "seconds": round(statistics.median(mine.clock for mine, _ in pairs), 2),
        "seconds_of_tools": round(statistics.median(other.clock for _, other in pairs), 2),
        "speed_over_tools": round(statistics.median(other.clock / mine.clock for mine, other in pairs), 3),
        "processor_over_tools": round(statistics.median(mine.processor / other.processor for mine, other in pairs), 3),
        "peak_bytes": max(mine.peak for mine, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("megabytes", 1024), ("level", 3), ("threads", os.cpu_count() or 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_output_options(parser)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.work, options.megabytes)
        return
    settings = {name: getattr(options, name) for name in ("megabytes", "level", "threads", "rounds")}
    publish({**provenance(), **settings, **measure(options.work, **settings)}, options)


if __name__ == "__main__":
    main()
