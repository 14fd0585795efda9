"""Manifests of format 1 as those of today: the one place that knows them.

They list every shard themselves, one file each, `shards/part-00000.arrow …`, with all columns of all targets in it. Shards
carry the fingerprint of the cache where today's carry the digest of their settings, and no digests of targets. The
fingerprint stays, and with it the order of training: a run goes on in it.
"""

from __future__ import annotations

from typing import Any

from teachercache.cache.files.column_groups import READ_BY_IN_1
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import COUNTS, ROWS_GROUP, FileTable, ShardTable

FORMAT_VERSION = 1
JOB_KEYS = ("teacher", "tokenizer", "corpus", "sequence", "targets", "units")


def fields_of(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Manifest` from the keys of a manifest of format 1, whose digest was right. Raises
    `ValueError`, `KeyError` or `TypeError` for what cannot be one."""
    if data["fingerprint"] != fingerprint_of({key: data[key] for key in JOB_KEYS}):
        raise ValueError("its fingerprint does not match its settings")
    plain = {key: data[key] for key in ("fingerprint", "teacher", "model", "corpus", "units", "targets", "created_by")}
    return {
        **plain,
        "settings": {key: data[key] for key in ("teacher", "tokenizer", "sequence")},
        "settings_fingerprint": data["fingerprint"],
        "target_digests": {},
        "groups": {ROWS_GROUP: tuple(data["targets"])},
        "shards": shards_of(data["shards"], group=ROWS_GROUP),
        "files": FileTable.from_entries(data["files"])[:],
        "column_bytes": data["column_bytes"],
        "calibration": data["calibration"],
        "read_by": {
            section: {role: data["calibration"][role]}
            for section, role in READ_BY_IN_1.items()
            if section in data["targets"] and data["calibration"].get(role) is not None
        },
        "fidelity": data["fidelity"],
        "input_form": data.get("input_form", {}),
        "audit": data["audit"],
        "format_version": FORMAT_VERSION,
    }


def shards_of(entries: list[dict[str, Any]], *, group: str) -> ShardTable:
    """The shards that a manifest of format 1, or an alignment's, lists."""
    files = FileTable.from_entries(entries)
    counts = {name: [entry[name] for entry in entries] for name in COUNTS}
    return ShardTable(counts, [""] * len(entries), {group: files})
