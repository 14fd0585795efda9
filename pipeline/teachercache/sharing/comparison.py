"""`compare`: in what two caches, or two runs, differ.

Of caches: every setting, target, count and file that is read, from the manifests; and, where it is asked for, how many rows
both hold. Of runs: every setting of `run.json`, and what their summaries say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.cache.manifest.model import Manifest
from teachercache.cache.reader import Cache
from teachercache.cache.row_keys import row_keys
from teachercache.cache.storage.source import manifest_of
from teachercache.config import is_url
from teachercache.errors import UserError
from teachercache.nested import ABSENT, differences

RUN = "run.json"
SUMMARY = "summary.json"
MOST_RUN_BYTES = 2**26


def compare(left: str, right: str, *, rows: bool = False) -> dict[str, Any]:
    """Compare two caches or two runs; returns what `--json` prints: `kind`, `left` and `right`, `equal`, and `differences`, a
    list of `key`, `left` and `right`; None stands for a key that is not there. `rows` counts rows of caches: in `both`,
    `left_only`, `right_only`.

    Raises `UserError` for a cache beside a run, or a folder that is neither, and what opening a cache raises.
    """
    kinds = [_kind(place) for place in (left, right)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{left} is a {kinds[0]} and {right} a {kinds[1]}; compare two of the same kind")
    describe = _cache if kinds[0] == "cache" else _run
    found = [_shown(item) for item in differences(describe(left), describe(right))]
    result = {"kind": kinds[0], "left": left, "right": right, "equal": not found, "differences": found}
    if not rows:
        return result
    if kinds[0] == "run":
        raise UserError("--rows counts rows of caches, and these are runs; leave it out")
    return {**result, "rows": _common_rows(left, right)}


def _kind(place: str) -> str:
    if is_url(place) or not (Path(place) / RUN).is_file():
        return "cache"
    return "run"


def _shown(difference: Any) -> dict[str, Any]:
    values = {"left": difference.left, "right": difference.right}
    return {"key": difference.key, **{side: None if value is ABSENT else value for side, value in values.items()}}


def _cache(location: str) -> dict[str, Any]:
    manifest: Manifest = manifest_of(location)
    return {
        "fingerprint": manifest.fingerprint,
        "settings_fingerprint": manifest.settings_fingerprint,
        "format_version": manifest.format_version,
        "settings": manifest.settings,
        "teacher": manifest.teacher,
        "tokenizer": manifest.tokenizer,
        "sequence": manifest.sequence,
        "targets": manifest.targets,
        "target_digests": manifest.target_digests,
        "model": manifest.model,
        "corpus": manifest.corpus,
        "audit": vars(manifest.audit),
        "rows": manifest.rows,
        "held_out_rows": manifest.held_out_rows,
        "positions": manifest.positions,
        "shards": len(manifest.shards),
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "created_by": manifest.created_by,
    }


def _run(folder: str) -> dict[str, Any]:
    """Its identity, and what it came to as far as it is finished."""
    described: dict[str, Any] = _read(Path(folder) / RUN)
    summary = Path(folder) / SUMMARY
    return {**described, "summary": _read(summary) if summary.is_file() else {}}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = json.loads(stream.read(MOST_RUN_BYTES))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object; restore it from a backup")
    return content


def _common_rows(left: str, right: str) -> dict[str, dict[str, int]]:
    """Counts by split. Rows have equal keys where they have equal ids, but for one pair in 10^19."""
    keys = [row_keys(Cache.open(place)) for place in (left, right)]
    counted: dict[str, dict[str, int]] = {}
    for split in keys[0]:
        ours, theirs = keys[0][split], keys[1][split]
        both = len(np.intersect1d(ours, theirs, assume_unique=True))
        counted[split] = {"both": both, "left_only": len(ours) - both, "right_only": len(theirs) - both}
    return counted
