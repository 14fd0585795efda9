"""Caches whose digests are right and whose contents lie: parts of a real one, rewritten and signed anew."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from teachercache.cache import Cache, verify
from teachercache.cache.files.column_groups import target_digests
from teachercache.cache.files.digests import fingerprint_of, hash_file
from teachercache.cache.files.entries import COUNTS, FILE_COLUMNS
from teachercache.cache.files.schema import METADATA_KEY
from teachercache.cache.inspection import describe
from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.cache.manifest.model import cache_fingerprint
from teachercache.cache.shards.row_ids import row_ids_digest
from teachercache.targets.logits.kind import first_choice_tail

Data = dict[str, Any]
INDEX = "index/part-00000-forged.json"


def manifest_of(folder: Path) -> Data:
    """The manifest with its index as a list: `shards`, each with its counts, and `files`."""
    data = json.loads((folder / MANIFEST).read_text())
    [entry] = data.pop("index")
    index = json.loads((folder / entry["file"]).read_text())
    shards, groups = index["shards"], index["shards"]["files"]
    data["shards"] = [
        {
            **{name: shards[name][number] for name in (*COUNTS, "row_ids")},
            "files": {group: {name: table[name][number] for name in FILE_COLUMNS} for group, table in groups.items()},
        }
        for number in range(len(shards["rows"]))
    ]
    return data


def sign(folder: Path, edit: Callable[[Data], Any] = lambda data: None) -> None:
    """Edit the manifest, and make sizes, digests, totals and fingerprints right again."""
    data = manifest_of(folder)
    edit(data)
    write_signed(folder, data)


def write_signed(folder: Path, data: Data, *, digests: Mapping[str, str] | None = None) -> None:
    """Write a manifest as `manifest_of` gives it; what can be made right of it is. `digests` are of targets, in the place of
    the right ones."""
    wrong = (TypeError, AttributeError, KeyError, ValueError, OverflowError)
    with contextlib.suppress(*wrong):
        entries = [*data["files"], *(info for shard in data["shards"] for info in shard["files"].values())]
        for entry in entries:
            path = folder / str(entry["file"])
            if path.is_file():
                entry.update(bytes=path.stat().st_size, sha256=hash_file(path))
    with contextlib.suppress(*wrong):
        data["totals"] = {
            "shards": len(data["shards"]),
            "bytes": 0,
            **{n: sum(s[n] for s in data["shards"]) for n in COUNTS},
        }
        data["totals"]["bytes"] = sum(info["bytes"] for shard in data["shards"] for info in shard["files"].values())
    with contextlib.suppress(*wrong):
        listed = {info["file"]: info["sha256"] for info in data["files"]}
        read_by = {
            section: {role: listed[name] for role, name in files.items()} for section, files in data["read_by"].items()
        }
        data["target_digests"] = target_digests(data["targets"], read_by) | dict(digests or {})
    with contextlib.suppress(*wrong):
        data["settings_fingerprint"] = fingerprint_of(data["settings"])
    with contextlib.suppress(*wrong):
        data["fingerprint"] = cache_fingerprint(
            data["settings_fingerprint"], data["target_digests"], data["corpus"], data["units"]
        )
    head = {key: value for key, value in data.items() if key not in ("shards", "digest")}
    head["index"] = [_write_index(folder, data.get("shards"))]
    unsigned = {key: value for key, value in head.items() if key != "format"}
    (folder / MANIFEST).write_text(json.dumps({**head, "digest": fingerprint_of(unsigned)}))


def _write_index(folder: Path, shards: Any) -> Data:
    try:
        groups = list(shards[0]["files"])
        columns: Any = {name: [shard[name] for shard in shards] for name in (*COUNTS, "row_ids")}
        columns["files"] = {
            group: {name: [shard["files"][group][name] for shard in shards] for name in FILE_COLUMNS}
            for group in groups
        }
    except (TypeError, AttributeError, KeyError, IndexError):
        columns = shards  # no lists of shards left
    for path in (folder / "index").iterdir():
        path.unlink()
    empty = {name: [] for name in FILE_COLUMNS}
    (folder / INDEX).write_text(json.dumps({"format": "teachercache-index", "shards": columns, "files": empty}))
    count = len(shards) if isinstance(shards, list) else 0
    path = folder / INDEX
    return {"file": INDEX, "bytes": path.stat().st_size, "sha256": hash_file(path), "first": 0, "shards": count}


def rewrite(
    folder: Path,
    *,
    columns: Callable[[dict[str, list[Any]]], Any] = lambda data: None,
    metadata: Callable[[Data], Any] = lambda data: None,
    types: Mapping[str, pa.DataType] | None = None,
) -> None:
    """Edit the first shard's values (a list for each column, of all its files), its metadata (that of its rows, with the
    columns of all its files), or types of columns, and sign the cache again."""
    paths = [folder / info["file"] for info in manifest_of(folder)["shards"][0]["files"].values()]
    tables = [_table(path) for path in paths]
    described = [json.loads(table.schema.metadata[METADATA_KEY]) for table in tables]
    own = [list(each["columns"]) for each in described]
    values = {name: column for table in reversed(tables) for name, column in table.to_pydict().items()}
    whole = {**described[0], "columns": {name: each for part in described for name, each in part["columns"].items()}}
    columns(values)
    metadata(whole)
    for path, table, mine, names in zip(paths, tables, described, own, strict=True):
        said = whole if mine is described[0] else mine
        if isinstance(whole.get("columns"), dict):
            said = {**said, "columns": {name: whole["columns"][name] for name in names if name in whole["columns"]}}
        _write(path, table, values, said, types or {})

    def named(data: Data) -> None:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            data["shards"][0]["row_ids"] = row_ids_digest(values["row_id"])

    sign(folder, named)


def _table(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _write(path: Path, table: pa.Table, values: Data, described: Any, types: Mapping[str, pa.DataType]) -> None:
    fields = [pa.field(field.name, types.get(field.name, field.type)) for field in table.schema]
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(described)})
    arrays = [pa.array(values[field.name], type=field.type) for field in fields]
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        claimed = described.get("rows_per_batch")
        size = claimed if isinstance(claimed, int) and 0 < claimed < len(batch) else len(batch)
        for start in range(0, len(batch), size):
            writer.write_batch(batch.slice(start, size))


def payload(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit what the first row holds in one target column, a writable array, and code it again as the kind would."""
    cache = Cache.open(folder)
    shard = cache.shard(0)
    rows = [shard.read_row(index, None, cache.recent).targets[name].copy() for index in range(shard.info.rows)]
    rows[0] = edit(rows[0])
    [column] = [column for group in cache.groups for column in group.columns if column.name == name]
    tables, pages = column.encode(rows)
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
    """Problems that `verify` finds: it never raises."""
    return [problem.reason for problem in verify(folder)]
