"""Does reading cost more than it did? Opening, verifying and streaming a cache, beside an earlier checkout of the project.

    python tests/bench/reading_cost.py WORK_FOLDER [--against CHECKOUT] [--rows 2048] [--rounds 5] [--out FILE] [--json]

Each checkout makes the same synthetic caches (synthetic_cache.py, kinds `top-k` and `sketch`) in its own format, and reads
them in processes of their own, in turns, so that a busy machine disturbs both alike. Processor time alone is counted,
without that of imports (a second of torch), and with an allocator that keeps what it has: as the heap happens to lie,
glibc's gives memory back between batches or does not, and 40,000 pages that are taken anew are a tenth of a pass.

    open     `Cache.open`, of a cache of many small shards, again and again
    verify   every file, with its digest, the least of nine
    first    the first pass over all rows in training's order as tensors of batches, of a cache that was opened for it: hashing
             and checks are in it; the least of five
    later    a later pass, the least of nine: one alone takes a tenth of a second, which pages and caches move by half

The result holds medians of the seconds over rounds, and the medians of the ratios within each round (now over before).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
REPEATED = {"verify": 9, "first": 5, "later": 9}
# What glibc's allocator gives back to the system, and takes as pages of their own.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_MMAP_THRESHOLD_": str(2**26)}
LENGTH, BATCH, OPENED, SMALL_ROWS = 256, 8, 20, 64


def make(folder: Path, *, rows: int) -> None:
    """The caches, by the checkout whose packages are on the path."""
    import synthetic_cache

    for name, write in (("top-k", synthetic_cache.top_k_cache), ("sketch", synthetic_cache.sketch_cache)):
        write(folder / name, count=rows, length=LENGTH)
    synthetic_cache.ROWS_PER_SHARD = 1  # as many shards as rows
    synthetic_cache.top_k_cache(folder / "many", count=SMALL_ROWS, length=LENGTH)


def measure(folder: Path) -> dict[str, float]:
    """Seconds of processor time, by what is done."""
    Cache, verify = _names()
    _stream(Cache.open(folder / "many"))  # imports
    found = {"open": _seconds(lambda: [Cache.open(folder / "many") for _ in range(OPENED)])}
    for name in ("top-k", "sketch"):
        cache = Cache.open(folder / name)
        works = {
            "verify": lambda name=name: _checked(verify(folder / name)),
            "first": lambda name=name: _stream(Cache.open(folder / name)),
            "later": lambda cache=cache: _stream(cache),
        }
        _stream(cache)
        for what, work in works.items():
            found[f"{what} {name}"] = min(_seconds(work) for _ in range(REPEATED[what]))
    return found


def _names() -> tuple[Any, Any]:
    try:
        from teachercache.cache import Cache, verify
    except ImportError:  # an earlier checkout, which had them elsewhere
        earlier = importlib.import_module(".shards", "teachercache")
        return earlier.Cache, earlier.verify
    return Cache, verify


def _seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _checked(problems: list[Any]) -> None:
    assert not problems, problems


def _stream(cache: Any) -> None:
    from teachercache.stream.collate import Collator
    from teachercache.stream.sources import train_order

    try:
        from teachercache.stream.order.batch_plan import BatchPlan
    except ImportError:
        from teachercache.stream.batches import BatchPlan
    rows = cache.rows_of("train")
    plan = BatchPlan(train_order(cache, seed=0), BATCH, BATCH, 1)
    columns = cache.kind.objective_columns(cache.kind.tail_policies[0])
    try:
        from teachercache.stream.cache_rows import OwnRows
    except ImportError:
        collate = Collator.of(cache, columns=columns)  # type: ignore[arg-type,call-arg]
    else:
        collate = Collator.of(OwnRows(cache, columns))
    for step in range(rows // BATCH):
        collate([cache.read_row("train", int(index), columns=columns) for index in plan.step_rows(step)])


def _run(checkout: Path, *arguments: str) -> str:
    """This script, with a checkout's packages."""
    paths = os.pathsep.join(str(checkout / name) for name in ("pipeline", "tests/bench"))
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


def compare(folder: Path, checkouts: dict[str, Path], *, rows: int, rounds: int) -> dict[str, Any]:
    """Medians by checkout and of the ratios."""
    for name, checkout in checkouts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        _run(checkout, str(folder / name), "--rows", str(rows), "--part", "make")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(rounds):
        turns = list(checkouts.items())
        for name, checkout in turns if number % 2 else reversed(turns):
            runs[name].append(json.loads(_run(checkout, str(folder / name), "--part", "measure").splitlines()[-1]))
    seconds = {name: _medians(found) for name, found in runs.items()}
    if "before" not in runs:
        return {"seconds": seconds}
    pairs = zip(runs["now"], runs["before"], strict=True)
    return {"seconds": seconds, "ratios": _medians([{key: now[key] / old[key] for key in now} for now, old in pairs])}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(each[key] for each in found), 4) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier checkout")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="a file to record the result in")
    parser.add_argument("--json", action="store_true", help="the result on one line")
    options = parser.parse_args()
    if options.part == "make":
        make(options.folder, rows=options.rows)
    elif options.part == "measure":
        print(json.dumps(measure(options.folder)))
    else:
        from provenance import provenance, publish

        checkouts = {"now": HERE, **({"before": options.against.resolve()} if options.against else {})}
        found = compare(options.folder, checkouts, rows=options.rows, rounds=options.rounds)
        against = f" --against CHECKOUT --rows {options.rows} --rounds {options.rounds}"
        command = f"python tests/bench/reading_cost.py WORK{against}"
        publish({"command": command, **provenance(), **found}, options)


if __name__ == "__main__":
    main()
