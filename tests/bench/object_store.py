"""The cost of reading a cache from an object store over reading it from a folder.

    python tests/bench/object_store.py CACHE [--rows 2000] [--latency 0.2] [--repeats 3] [--json]

The cache is uploaded to an S3 server on this machine (moto's, which takes its share of the cores), behind a proxy that
holds every answer with a shard's bytes back for `latency` seconds. Rows are read in shard order, with every column that a
sketch or ghost loss reads. Measured, each in a process of its own: seconds to open the cache, to its first row from nothing,
and rows/s until all of them are read; `folder` reads the folder, `cold` begins without local copies, `ahead` as well but
fetches the next shards in the background while it reads, `warm` finds all of them there. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import add_output_options, provenance, publish

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import s3_server

ARMS = ("folder", "cold", "ahead", "warm")
AHEAD = 4  # shards


def measure(location: str, local: Path, *, rows: int, ahead: bool) -> dict[str, float]:
    from teachercache.cache import Cache

    start = time.perf_counter()
    cache = Cache.open(location, local=local)
    opened = time.perf_counter() - start
    columns = cache.kind.objective_columns(cache.kind.tail_policies[0])
    shards = cache.manifest.shards
    first, read = 0.0, 0
    for number, shard in enumerate(shards):
        if ahead:
            cache.prefetch(range(number + 1, min(number + 1 + AHEAD, len(shards))))
        for _ in range(shard.rows - shard.held_out_rows):
            if read == rows:
                break
            cache.read_row("train", read, columns=columns)
            first = first or time.perf_counter() - start
            read += 1
    return {
        "open_seconds": opened,
        "first_row_seconds": first,
        "rows": read,
        "rows_per_second": read / (time.perf_counter() - start),
    }


def in_a_process(location: str, local: Path, options: argparse.Namespace, *, ahead: bool) -> dict[str, float]:
    command = [sys.executable, __file__, location, "--measure", str(local), "--rows", str(options.rows)]
    done = subprocess.run([*command, *(["--ahead"] if ahead else [])], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.cache, options.measure, rows=options.rows, ahead=options.ahead)))
        return
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with s3_server() as server, tempfile.TemporaryDirectory() as name:
        url = server.upload(Path(options.cache), "bench/cache")
        server.break_next(match="shards/", times=-1, kind="stall", after=0, seconds=options.latency)
        for repeat in range(options.repeats):
            for arm in ARMS:
                local = Path(name) / f"{repeat}-{'cold' if arm == 'warm' else arm}"
                location = options.cache if arm == "folder" else url
                runs[arm].append(in_a_process(location, local, options, ahead=arm == "ahead"))
    result = {arm: {key: statistics.median(run[key] for run in runs[arm]) for key in runs[arm][0]} for arm in ARMS}
    size = sum(path.stat().st_size for path in (Path(options.cache) / "shards").iterdir())
    settings = {name: getattr(options, name) for name in ("rows", "latency", "repeats")}
    publish({**provenance(), "cache_megabytes": size / 1e6, **settings, **result}, options)


if __name__ == "__main__":
    main()
