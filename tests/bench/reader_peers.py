"""Rows a second from disk to the tensors of a batch: this reader beside MosaicML Streaming and Hugging Face `datasets`.

    pip install mosaicml-streaming datasets
    python tests/bench/reader_peers.py WORK_FOLDER [--rows 3000] [--rounds 5] [--epochs 3] [--out FILE] [--json]

The same rows for all (input ids, target mask, 64 ids and values of a head, tail log-partitions at four temperatures; synthetic,
see synthetic_cache.py), shuffled, in one process without loading workers, and the same tensors out of each, which a sum over
each epoch checks. Every peer at its best documented settings; rows of one length, so that it may fix shapes.

    ours               kind top-k: Arrow, zstd, sha256 of every shard; stores texts, ids of rows and log p of labels besides
    ours, large        the same of a cache of four times as many rows, far beyond the 256 MiB that the reader keeps decompressed
    ours, sketch       the default kind, for information: other content
    streaming          MDS shards, zstd, `ndarray` columns of static shape, `validate_hash` (xxh64, its fastest)
    streaming, sha256  the same with the hash that we use
    datasets           Parquet, zstd, binary columns, `load_dataset(streaming=True).shuffle(buffer_size=1000)`; no hashes; the
                       5 s that it waits for its threads after each epoch are taken out

Each round runs every arm in a process of its own for some epochs. `first` is the first epoch from opening on: hashing, and
for MDS unpacking beside its shards, as it does where no unpacked copy is left. `later` is the median of the others. Files
are in the page cache throughout. Medians over rounds; ratios within each round, by the clock and by processor time, which a
busy machine disturbs less. Epochs must be two or more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import add_output_options, provenance, publish
from synthetic_cache import HEAD, TEMPERATURES, rows, sketch_cache, top_k_arrays, top_k_cache

from teachercache.stream.cache_rows import OwnRows
from teachercache.targets.coding.float16 import float32_of

LENGTH, BATCH, ROWS_PER_FILE = 256, 8, 1024
SHAPES = {
    "input_ids": ("int32", (LENGTH,)),
    "target_mask": ("uint8", (LENGTH,)),
    "head_ids": ("uint16", (LENGTH - 1, HEAD)),
    "head_logits": ("float16", (LENGTH - 1, HEAD)),
    "tail_log_partition": ("float16", (LENGTH - 1, len(TEMPERATURES))),
}
MDS_HASHES = {"streaming": "xxh64", "streaming, sha256": "sha256"}
OWN = {"ours": "top-k", "ours, large": "top-k, large", "ours, sketch": "sketch"}
ARMS = (*OWN, *MDS_HASHES, "datasets")
LARGE = 4  # times the rows
HALVES = ("head_logits", "tail_log_partition")
Epochs = Iterator[Iterator[dict[str, Any]]]  # of an arm: epochs of batches


def content(count: int) -> Iterator[dict[str, np.ndarray]]:
    for number, row in enumerate(rows(count, length=LENGTH)):
        arrays = top_k_arrays(row.positions, seed=number)
        plain = {"input_ids": row.input_ids_S, "target_mask": row.target_mask_S.astype(np.uint8), **arrays}
        yield {name: plain[name] for name in SHAPES}


def write_mds(folder: Path, count: int) -> None:
    from streaming import MDSWriter

    columns = {
        name: f"ndarray:{dtype}:{','.join(str(size) for size in shape)}" for name, (dtype, shape) in SHAPES.items()
    }
    settings = {"compression": "zstd:3", "hashes": ["sha256", "xxh64"], "size_limit": "64mb"}
    with MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for row in content(count):
            writer.write(row)


def write_parquet(folder: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    schema = pa.schema([pa.field(name, pa.binary()) for name in SHAPES])
    made, part = content(count), 0
    while taken := [row for _, row in zip(range(ROWS_PER_FILE), made, strict=False)]:
        table = pa.table({name: [row[name].tobytes() for row in taken] for name in SHAPES}, schema=schema)
        options = {"compression": "zstd", "use_dictionary": False, "row_group_size": 64, "write_statistics": False}
        pq.write_table(table, folder / f"part-{part:05d}.parquet", **options)
        part += 1


def prepare(work: Path, count: int) -> None:
    makers: dict[str, Callable[[Path], None]] = {
        "top-k": lambda folder: top_k_cache(folder, count=count, length=LENGTH),
        "top-k, large": lambda folder: top_k_cache(folder, count=LARGE * count, length=LENGTH),
        "sketch": lambda folder: sketch_cache(folder, count=count, length=LENGTH),
        "mds": lambda folder: write_mds(folder, count),
        "parquet": lambda folder: write_parquet(folder, count),
    }
    for name, make in makers.items():
        made = work / str(count) / name
        if not made.is_dir():
            print(f"writing {name}", file=sys.stderr)
            made.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial := made.with_name(f"{name}.partial"), ignore_errors=True)
            make(partial)
            partial.rename(made)


def ours(folder: Path) -> Epochs:
    from teachercache.cache import Cache
    from teachercache.stream.collate import Collator
    from teachercache.stream.dataset import CacheDataset
    from teachercache.stream.order.batch_plan import BatchPlan
    from teachercache.stream.sources import train_order

    cache = Cache.open(folder)
    columns = cache.kind.objective_columns(cache.kind.tail_policies[0])
    dataset, collate = CacheDataset([OwnRows(cache, columns)], "train"), Collator.of(OwnRows(cache, columns))
    plan = BatchPlan(train_order(cache, seed=0), BATCH, BATCH, 1)
    epoch = 0
    while True:
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        yield (collate(dataset.__getitems__(plan.step_rows(step).tolist()).rows) for step in steps)
        epoch += 1


def mosaic(folder: Path, validate: str) -> Epochs:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, validate_hash=validate)
    while True:  # each pass over the dataset is an epoch in an order of its own
        yield iter(DataLoader(dataset, batch_size=BATCH, collate_fn=joined))


def hugging_face(folder: Path) -> Epochs:
    from datasets import load_dataset

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    cached = str(folder.parent / "datasets-home")
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cached)
    dataset, epoch = dataset.shuffle(seed=0, buffer_size=1000), 0
    while True:
        dataset.set_epoch(epoch)
        yield (joined([from_bytes(row) for row in taken]) for taken in batched(dataset))
        epoch += 1


def batched(examples: Any) -> Iterator[list[dict[str, bytes]]]:
    taken: list[dict[str, bytes]] = []
    for example in examples:
        taken.append(example)
        if len(taken) == BATCH:
            yield taken
            taken = []
    if taken:
        yield taken


def from_bytes(row: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(row[name], dtype).reshape(shape) for name, (dtype, shape) in SHAPES.items()}


def joined(taken: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Batches that `Collator` makes of the same rows."""
    input_ids_BS = np.stack([row["input_ids"] for row in taken]).astype(np.int64)
    mask_BS = np.stack([row["target_mask"] for row in taken]).astype(bool)
    labels_BS = np.full(input_ids_BS.shape, -100, dtype=np.int64)
    labels_BS[:, :-1][mask_BS[:, :-1]] = input_ids_BS[:, 1:][mask_BS[:, :-1]]
    targets = {
        "head_ids": np.concatenate([row["head_ids"] for row in taken]).astype(np.int64),
        **{name: float32_of(np.concatenate([row[name] for row in taken])) for name in SHAPES if name in HALVES},
    }
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids_BS), "shift_labels": torch.from_numpy(labels_BS)}
    return batch | {"targets": {name: torch.from_numpy(values) for name, values in targets.items()}}


def epochs_of(arm: str, folder: Path) -> Epochs:
    if arm in MDS_HASHES:
        for unpacked in (folder / "mds").glob("*.mds"):
            unpacked.unlink()
        return mosaic(folder / "mds", MDS_HASHES[arm])
    if arm == "datasets":
        return hugging_face(folder / "parquet")
    return ours(folder / OWN[arm])


def import_libraries(arm: str) -> None:
    """Imports are no part of an epoch."""
    if arm in MDS_HASHES:
        import streaming  # noqa: F401
    elif arm == "datasets":
        import datasets

        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    else:
        import teachercache.stream.collate
        import teachercache.stream.dataset  # noqa: F401


def run_arm(arm: str, folder: Path, epochs: int, *, check: bool) -> dict[str, Any]:
    """Seconds of each epoch, and with `check` sums that equal content has in common."""
    torch.set_num_threads(1)
    import_libraries(arm)
    seconds, cpu_seconds, sums, seen = [], [], np.zeros(5), 0
    began, cpu_began = time.perf_counter(), time.process_time()
    made = epochs_of(arm, folder)
    for number in range(epochs):
        for batch in next(made):
            seen += len(batch["input_ids"])
            if check and number == 0 and "head_logits" in batch["targets"]:
                tensors = [batch["input_ids"], batch["shift_labels"], *batch["targets"].values()]
                sums += [float(values.double().sum()) for values in tensors[:5]]
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        began, cpu_began = time.perf_counter(), time.process_time()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "rows": seen // epochs, "sums": sums.tolist()}


def in_process(arm: str, folder: Path, epochs: int, *, check: bool = False) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        str(folder),
        "--arm",
        arm,
        "--epochs",
        str(epochs),
        *(["--check"] if check else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(work: Path, *, count: int, rounds: int, epochs: int) -> dict[str, Any]:
    prepare(work, count)
    folder = work / str(count)
    checked = {arm: in_process(arm, folder, 1, check=True) for arm in ("ours", *MDS_HASHES, "datasets")}
    for arm, result in checked.items():
        if not np.allclose(result["sums"], checked["ours"]["sums"], rtol=1e-9) or result["rows"] != count:
            raise SystemExit(f"{arm} gave other content: {result} against {checked['ours']}")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in (*ARMS[number % len(ARMS) :], *ARMS[: number % len(ARMS)]):
            runs[arm].append(in_process(arm, folder, epochs))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    peers = [arm for arm in ARMS if not arm.startswith("ours")]
    result: dict[str, Any] = {
        **provenance(),
        "rows": count,
        "batch": BATCH,
        "bytes_on_disk": {path.name: size_of(path) for path in sorted(folder.iterdir()) if size_of(path)},
    }
    for clock, unit in (("seconds", "rows_per_second"), ("cpu_seconds", "rows_per_cpu_second")):
        speeds = {arm: [rows_per_second(run[clock], run["rows"]) for run in runs[arm]] for arm in ARMS}
        result[unit] = {arm: medians(values) for arm, values in speeds.items()}
        for own in ("ours", "ours, large"):
            result[f"{own} over, by {clock}"] = {arm: medians(quotients(speeds[own], speeds[arm])) for arm in peers}
    return result


def rows_per_second(seconds: list[float], count: int) -> dict[str, float]:
    return {"first": count / seconds[0], "later": count / statistics.median(seconds[1:])}


def quotients(ours: list[dict[str, float]], peers: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{when: a[when] / b[when] for when in a} for a, b in zip(ours, peers, strict=True)]


def medians(values: list[dict[str, float]]) -> dict[str, float]:
    middle = {when: statistics.median(value[when] for value in values) for when in values[0]}
    return {when: round(value) if value > 100 else round(value, 2) for when, value in middle.items()}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def missing_peers() -> list[str]:
    from importlib.util import find_spec

    return [
        package
        for package, module in (("mosaicml-streaming", "streaming"), ("datasets", "datasets"))
        if not find_spec(module)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("rows", 3000), ("rounds", 5), ("epochs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.work, options.epochs, check=options.check)))
        return
    if missing := missing_peers():
        raise SystemExit(f"this compares with packages that are not installed: pip install {' '.join(missing)}")
    result = measure(options.work, count=options.rows, rounds=options.rounds, epochs=options.epochs)
    publish(result, options)


if __name__ == "__main__":
    main()
