"""Caches whose digests are right and whose contents lie: parts of a real one, rewritten and signed anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from teachercache.shards import Cache, verify
from teachercache.shards.inspection import describe
from teachercache.shards.manifest import JOB_KEYS, MANIFEST, fingerprint_of, hash_file
from teachercache.shards.schema import METADATA_KEY
from teachercache.targets.kind import first_choice_tail

SHARD = "shards/part-00000.arrow"


def sign(folder: Path, edit: Callable[[dict[str, Any]], Any] = lambda data: None) -> None:
    """Edit the manifest, and make sizes, digests and the fingerprint right again."""
    data = json.loads((folder / MANIFEST).read_text())
    edit(data)
    for entry in [*data["shards"], *data["files"]]:
        path = folder / str(entry["file"])
        if path.is_file():
            entry.update(bytes=path.stat().st_size, sha256=hash_file(path))
    if set(JOB_KEYS) <= data.keys():
        data["fingerprint"] = fingerprint_of({name: data[name] for name in JOB_KEYS})
    del data["digest"]
    unsigned = {name: value for name, value in data.items() if name != "format"}
    (folder / MANIFEST).write_text(json.dumps({**data, "digest": fingerprint_of(unsigned)}))


def rewrite(
    folder: Path,
    *,
    columns: Callable[[dict[str, list[Any]]], Any] = lambda data: None,
    metadata: Callable[[dict[str, Any]], Any] = lambda data: None,
    types: Mapping[str, pa.DataType] | None = None,
) -> None:
    """Edit the first shard's values (a list for each column), its metadata, or types of columns, and sign the cache again."""
    path = folder / SHARD
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    values, described = table.to_pydict(), json.loads(table.schema.metadata[METADATA_KEY])
    columns(values)
    metadata(described)
    fields = [pa.field(field.name, (types or {}).get(field.name, field.type)) for field in table.schema]
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(described)})
    arrays = [pa.array(values[field.name], type=field.type) for field in fields]
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        claimed = described.get("rows_per_batch")
        size = claimed if isinstance(claimed, int) and 0 < claimed < len(batch) else len(batch)
        for start in range(0, len(batch), size):
            writer.write_batch(batch.slice(start, size))
    sign(folder)


def payload(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit what the first row holds in one target column, a writable array, and code it again as the kind would."""
    cache = Cache.open(folder)
    shard = cache.shard(0)
    rows = [shard.read_row(index, None, cache.recent).targets[name].copy() for index in range(shard.info.rows)]
    rows[0] = edit(rows[0])
    tables, pages = shard.columns[name].encode(rows)
    coded = base64.b64encode(tables).decode()
    rewrite(
        folder,
        columns=lambda data: data.update({name: pages}),
        metadata=lambda data: data["columns"][name].update({"tables": coded} if tables else {}),
    )


def read_everything(folder: Path) -> None:
    """Every row of a cache as a training job and `inspect` read it; what comes out is of the promised shape and range."""
    cache = Cache.open(folder)
    describe(cache)
    assert cache.boundary is None or cache.boundary.begins_V.shape == (cache.manifest.vocabulary_size,)
    kind, manifest = cache.kind, cache.manifest
    V = manifest.vocabulary_size
    of = {column.name: column.of for column in cache.targets.columns}
    for split in ("train", "held-out"):
        for index in range(cache.rows_of(split)):
            stored = cache.read_row(split, index)
            row = stored.row
            assert row.length <= manifest.sequence_length and row.held_out == (split == "held-out")
            assert row.input_ids_S.dtype == np.int32 and 0 <= row.input_ids_S.min() <= row.input_ids_S.max() < V
            assert row.target_mask_S.shape == row.input_ids_S.shape and len(row.labels_N()) == row.positions
            assert len(row.position_ids_S()) == row.length
            for name, values in cache.targets.decoded(stored.targets).items():
                counts = {"pair": row.pairs, "position": row.positions}
                assert len(values) == counts.get(of.get(name, "token"), row.length), name
                assert np.isfinite(values).all(), name
            arrays = kind.decoded({name: stored.targets[name] for name in cache.logit_columns})
            for name, values in arrays.items():
                assert len(values) == row.positions, name
                if values.dtype == np.int32 and row.positions:
                    assert 0 <= values.min() <= values.max() < V, name
                assert not np.isnan(values).any(), name
            softened = kind.softened(arrays, 1.0, tail=first_choice_tail(kind))
            assert not np.isnan(softened.head_log_prob_Nk).any()


def problems(folder: Path) -> list[str]:
    """What `verify` says: it never raises."""
    return [problem.reason for problem in verify(folder)]
