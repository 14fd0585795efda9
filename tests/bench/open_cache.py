"""Time and memory from nothing to the first batch, when a cache has very many shards.

    python tests/bench/open_cache.py CACHE [--shards 100000] [--json]

The manifest of a real cache, its shards listed again and again until there are that many entries (all of them name
files that exist, hard links to its own). Measured in a process of its own: seconds to open it and to read the first batch
of 8 rows in training's order, and the memory that opening adds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import add_output_options, provenance, publish

from teachercache.stream.cache_rows import OwnRows


def multiply(cache: Path, folder: Path, shards: int) -> None:
    """A cache in `folder` whose manifest has so many entries; files are links to those of `cache`."""
    from dataclasses import replace

    from teachercache.cache.files.entries import ShardTable
    from teachercache.cache.manifest.manifest import commit_manifest, read_manifest
    from teachercache.cache.stores.local import LocalStore

    manifest = read_manifest(cache)
    shutil.copytree(cache / "teacher", folder / "teacher")
    entries = []
    for number in range(shards):
        shard = manifest.shards[number % len(manifest.shards)]
        files = {}
        for group, info in shard.files.items():
            files[group] = replace(info, file=f"{group}/part-{number:06d}-{info.sha256[:12]}.arrow")
            path = folder / files[group].file
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(cache / info.file, path)
        entries.append(replace(shard, files=files))
    commit_manifest(replace(manifest, shards=ShardTable.of(entries)), LocalStore(folder))


def measure(folder: Path) -> dict[str, float]:
    from teachercache.cache import Cache
    from teachercache.stream.collate import Collator
    from teachercache.stream.order.batch_plan import BatchPlan
    from teachercache.stream.sources import train_order

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    cache = Cache.open(folder)
    opened = time.perf_counter() - start
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    plan = BatchPlan(train_order(cache, seed=0), 8, 8, 1)
    columns = cache.kind.objective_columns(cache.kind.tail_policies[0])
    rows = [cache.read_row("train", int(index), columns=columns) for index in plan.step_rows(0)]
    Collator.of(OwnRows(cache, columns))(rows)
    batch = time.perf_counter() - start
    return {"open_seconds": opened, "open_megabytes": added / 1024, "first_batch_seconds": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.cache)))
        return
    with tempfile.TemporaryDirectory(dir=options.cache.resolve().parent) as name:
        folder = Path(name)
        multiply(options.cache, folder, options.shards)
        size = sum(path.stat().st_size for path in (folder / "manifest.json", *(folder / "index").iterdir()))
        command = [sys.executable, __file__, str(folder), "--measure"]
        runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    best = sorted(runs, key=lambda run: run["open_seconds"])[1]
    result = {**provenance(), "shards": options.shards, "manifest_megabytes": size / 1e6, **best}
    publish(result, options)


if __name__ == "__main__":
    main()
