"""Planning, resuming and finishing a job of very many units: seconds, and memory of the driver and of all of Ray's processes.

    python tests/bench/plan_at_scale.py FOLDER [--rows 10000000] [--units 100000] [--json]

The corpus is Parquet, its texts 120 characters each. The teacher is tiny and real; it computes the first units. Records and
shards of the others are copies of those of the first one, under names of their own: what is measured is what stands around the
teacher. Each run is the command line's own. Measured: from the start of the process to the first unit in the cache; the same
with half of the units done and 1 ms added to every call that asks the cache's or the corpus's file system for a name (a library
that is loaded before libc), to the line that says how many are done; committing; running the finished job again; opening the
cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from provenance import add_output_options, provenance, publish

from builders import tiny_recipe, tiny_teacher

MARK = "TEACHERCACHE_PLAN_AT_SCALE"
WORDS = "the model reads a row of tokens and asks what its teacher would have said of each"
FILE_ROWS, GROUP_ROWS = 250_000, 50_000
LINKS = 50_000  # of one file: file systems allow little more
SLOW_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static void slow(const char *path) {
    const char *under = getenv("SLOW_UNDER");
    if (path && under && !strncmp(path, under, strlen(under))) usleep(1000);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \
    slow(path); return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
static void slow_at(int at, const char *path) {
    if (path && path[0] != '/' && at != AT_FDCWD) usleep(1000); else slow(path);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list);
    slow_at(at, path); return real(at, path, flags, mode); }
int stat(const char *path, struct stat *to) { REAL(stat); slow(path); return real(path, to); }
int lstat(const char *path, struct stat *to) { REAL(lstat); slow(path); return real(path, to); }
int fstatat(int at, const char *path, struct stat *to, int flags) {
    REAL(fstatat); slow_at(at, path); return real(at, path, to, flags); }
int access(const char *path, int mode) { REAL(access); slow(path); return real(path, mode); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); slow(path); return real(path, mode); }
int unlink(const char *path) { REAL(unlink); slow(path); return real(path); }
int rename(const char *from, const char *to) { REAL(rename); slow(from); return real(from, to); }
DIR *opendir(const char *path) { REAL(opendir); slow(path); return real(path); }
"""


@dataclass
class Run:
    """One run of the command: seconds on the clock and of processors to its marks, and the most memory."""

    seconds: float
    driver_processor_seconds: float
    driver_gb: float
    all_gb: float
    said: str


def write_corpus(folder: Path, rows: int) -> None:
    """Parquet files with texts that all differ."""
    folder.mkdir()
    words = np.array(
        [
            "the",
            "model",
            "reads",
            "a",
            "row",
            "of",
            "tokens",
            "and",
            "asks",
            "what",
            "its",
            "teacher",
            "would",
            "have",
            "said",
            "of",
            "each",
        ]
    )
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - first)
        chosen = words[rng.integers(len(words), size=(count, 24))]
        texts = [f"{first + row} {' '.join(line)}" for row, line in enumerate(chosen)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number:04d}.parquet", row_group_size=GROUP_ROWS)


def memory(mark: str) -> Iterator[tuple[int, str, float]]:
    """Process, command and proportional set size in GB of each process that a run has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                size = next(
                    line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
                )
                yield int(folder.name), (folder / "cmdline").read_text(), int(size.split()[1]) / 2**20
        except (OSError, StopIteration):
            continue


def processor_seconds(process: int) -> float:
    """Seconds that processors worked for a process; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(recipe: Path, until: Callable[[str], bool] | None, *options: str, **environment: str) -> Run:
    """The command, to its end or until what it has said, and what it has done, are enough."""
    mark = f"{MARK}={os.getpid()}-{time.time_ns()}"
    name, value = mark.split("=")
    command = [sys.executable, "-m", "teachercache", "precompute", str(recipe), "--json", *options]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, name: value, **environment},
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    driver = everything = worked = 0.0
    while process.poll() is None and not (until is not None and until("".join(said))):
        sizes = [(number, size) for number, _, size in memory(mark)]
        driver = max([driver, *(size for number, size in sizes if number == process.pid)])
        everything = max(everything, sum(size for _, size in sizes))
        worked = max(worked, processor_seconds(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    for number, *_ in memory(mark):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    code = process.wait()
    assert until is not None or code == 0, "".join(said)
    return Run(round(seconds, 1), round(worked, 1), round(driver, 2), round(everything, 2), "".join(said))


def fill(cache: Path, *, upto: float) -> int:
    """Records and shards of the first units, after the example of one that is done; returns of how many."""
    work = cache / ".work"
    example = next((work / "done").glob("*.json"))
    record = json.loads(example.read_text())
    units = read_units(work)
    count = int(upto * len(units))
    shard = record["shard"]["files"]["shards"]
    original = cache / shard["file"]
    for unit in range(count):
        if (work / "done" / f"{unit:05d}.json").exists():
            continue
        name = f"shards/part-{unit:05d}-{shard['sha256'][:12]}.arrow"
        if unit % LINKS == 0:
            original = cache / name
            shutil.copy(cache / shard["file"], original)
        else:
            os.link(original, cache / name)
        files = {"shards": {**shard, "file": name}}
        copy = {**record, "documents": int(units[unit]), "shard": {**record["shard"], "files": files}}
        (work / "done" / f"{unit:05d}.json").write_text(json.dumps(copy, sort_keys=True))
    return count


def read_units(work: Path) -> Any:
    """Documents of each unit."""
    from teachercache.cache.stores.local import LocalStore
    from teachercache.precompute.planning.shelf import Shelf

    [folder] = work.glob("corpus-*")
    return Shelf(LocalStore(work), folder.name).read("units.arrow")["documents"].to_numpy()


def slow_library(folder: Path) -> Path:
    """The library that slows file systems down."""
    (folder / "slow.c").write_text(SLOW_C)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(folder / "slow.so"), str(folder / "slow.c"), "-ldl"]
    subprocess.run(command, check=True)
    return folder / "slow.so"


def opened(cache: Path) -> dict[str, float]:
    """Seconds to open the finished cache and to read a row of its last shard."""
    code = (
        "import sys, time; from teachercache.cache import Cache; start = time.perf_counter(); cache = Cache.open(sys.argv[1]);"
        "opened = time.perf_counter() - start; cache.read_row('train', cache.rows_of('train') - 1);"
        "print(opened, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True)
    first, both = map(float, done.stdout.split())
    return {"open": round(first, 2), "first_row": round(both - first, 3)}


def measure(folder: Path, *, rows: int, units: int) -> dict[str, Any]:
    """All figures."""
    cache = folder / "cache"
    write_corpus(folder / "corpus", rows)
    sections = {
        "corpus": {"source": str(folder / "corpus"), "held_out": 0.01},
        "sequence": {"length": 64},
        "precompute": {"unit_rows": rows // units, "positions_per_batch": 4096, "threads_per_actor": 1},
    }
    recipe = tiny_recipe(folder, teacher=tiny_teacher(folder / "teacher"), texts=[], **sections)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    start = run(file, lambda said: any(cache.glob(".work/done/*.json")))
    planned = len(read_units(cache / ".work"))
    half = fill(cache, upto=0.5)
    slow = {"LD_PRELOAD": str(slow_library(folder)), "SLOW_UNDER": str(folder)}
    resume = run(file, lambda said: "units are done" in said, **slow)
    fill(cache, upto=1.0)
    commit = run(file, None)
    again = run(file, None)
    assert "is complete" in again.said, again.said
    lists = [cache / "manifest.json", *(cache / "index").iterdir()]
    return {
        "rows": rows,
        "units": planned,
        "half": half,
        **{
            name: {field: value for field, value in vars(each).items() if field != "said"}
            for name, each in {"start": start, "resume": resume, "committing": commit, "no-op": again}.items()
        },
        "manifest_mb": round(sum(path.stat().st_size for path in lists) / 1e6, 1),
        "manifest_parts": len(lists),
        "reader_seconds": opened(cache),
    }


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--units", type=int, default=100_000)
    add_output_options(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name).resolve()
        found = measure(folder, rows=arguments.rows, units=arguments.units)
        shutil.rmtree(folder / "corpus")
    publish({**found, **provenance()}, arguments)


if __name__ == "__main__":
    main()
