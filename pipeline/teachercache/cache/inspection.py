"""Documents of `teachercache inspect`: a cache in numbers, and one row token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.reader import SPLITS, Cache, Split, StoredRow
from teachercache.cache.shards.one_column import ID_DIGITS
from teachercache.errors import CacheError


def describe(cache: Cache) -> dict[str, Any]:
    """The cache in numbers, from its manifest alone."""
    manifest = cache.manifest
    return {
        "cache": cache.name,
        "fingerprint": manifest.fingerprint,
        "settings_fingerprint": manifest.settings_fingerprint,
        "format_version": manifest.format_version,
        "teacher": {**manifest.teacher, **manifest.model},
        "tokenizer": manifest.tokenizer,
        "corpus": manifest.corpus,
        "sequence": manifest.sequence,
        "targets": manifest.targets,
        "rows": {split: cache.rows_of(split) for split in SPLITS},
        "positions": {split: cache.positions_of(split) for split in SPLITS},
        "shards": len(manifest.shards),
        "groups": {group: int(table.sizes.sum()) for group, table in manifest.shards.files.items()},
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "column_bytes": manifest.column_bytes,
        "audit": vars(manifest.audit),
        "read_by": manifest.read_by,
        "calibration": {name: value for name, value in manifest.calibration.items() if name not in ("rows", "sources")},
        "fidelity": manifest.fidelity,
        "alignments": [_describe_alignment(alignment) for alignment in CacheAlignment.all_of(cache)],
    }


def _describe_alignment(alignment: CacheAlignment) -> dict[str, Any]:
    manifest = alignment.manifest
    totals = manifest.totals
    return {
        "student": manifest.tokenizer["name"],
        "tokenizer": manifest.tokenizer["fingerprint"],
        "vocabulary_size": manifest.vocabulary_size,
        "tokens": totals.get("student_tokens", 0),
        "chunks": totals.get("chunks", 0),
        "aligned_fraction": round(totals.get("aligned_bytes", 0) / max(1, totals.get("bytes", 0)), 6),
        "rows_without_chunks": sum(manifest.unaligned.values()),
        "vocabulary_coverage": manifest.vocabulary["coverage"],
        "bytes": int(manifest.shards.sizes().sum()),
    }


def describe_row(cache: Cache, row_id: str, *, top: int = 5, student: str | None = None) -> dict[str, Any]:
    """One row, token by token, with the teacher's `top` next tokens at T = 1; where the cache has an alignment, with the tokens
    of that student and the chunks that both sides share.

    `row_id` may be a prefix, or `SPLIT:INDEX` such as `train:0`; `student` says which alignment, by its name or the
    beginning of its tokenizer's fingerprint, where there are several. Raises `CacheError` unless exactly one row, and
    alignment, matches.
    """
    place = _find(cache, row_id)
    stored = cache.read_row(*place, columns=cache.logit_columns)
    texts = cache.token_texts()
    row = stored.row
    ordinal = np.cumsum(row.target_mask_S) - 1
    tokens = []
    for index, token in enumerate(row.input_ids_S.tolist()):
        entry: dict[str, Any] = {"id": token, "text": texts.get(token, f"<{token}>"), "target": None}
        if row.target_mask_S[index]:
            entry["target"] = _describe_target(cache, stored, int(ordinal[index]), texts, top)
        tokens.append(entry)
    segments = [
        {**vars(segment), "contents": [content._asdict() for content in segment.contents]} for segment in row.segments
    ]
    for segment in segments:
        del segment["text"]
    described = {
        "row_id": row.row_id, "held_out": row.held_out, "positions": row.positions, "segments": segments, "tokens": tokens,
    }  # fmt: skip
    alignments = CacheAlignment.all_of(cache)
    described["alignments"] = [alignment.manifest.tokenizer["name"] for alignment in alignments]
    alignment = _chosen(alignments, student)
    return (
        described
        if alignment is None
        else described | _describe_aligned(alignment, alignment.aligned_row(*place, stored))
    )


def _chosen(alignments: list[CacheAlignment], student: str | None) -> CacheAlignment | None:
    """The one that is asked for, or the only one; none where there are several and nobody asks."""
    names = [alignment.manifest.tokenizer["name"] for alignment in alignments]
    if student is None:
        return alignments[0] if len(alignments) == 1 else None
    asked_for = [
        alignment
        for alignment in alignments
        if alignment.manifest.tokenizer["name"] == student
        or alignment.manifest.tokenizer["fingerprint"].startswith(student)
    ]
    if len(asked_for) != 1:
        raise CacheError(f"say which alignment with --student: {', '.join(names) or 'the cache has none'}")
    return asked_for[0]


def _describe_aligned(alignment: CacheAlignment, aligned: StoredRow) -> dict[str, Any]:
    """The student's tokens, and the chunks: `teacher` and `student` are how many of either side's tokens each holds."""
    texts = alignment.token_texts()
    names = ("teacher_counts", "student_counts", "aligned")
    counts = zip(*(aligned.targets[name].tolist() for name in names), strict=True)
    return {
        "student": alignment.manifest.tokenizer["name"],
        "student_tokens": [
            {"id": token, "text": texts.get(token, f"<{token}>"), "learned": bool(learned)}
            for token, learned in zip(
                aligned.row.input_ids_S.tolist(), np.append(False, aligned.row.target_mask_S[:-1]).tolist(), strict=True
            )
        ],
        "chunks": [
            {"teacher": teacher, "student": student, "aligned": bool(aligned)} for teacher, student, aligned in counts
        ],
    }


def _describe_target(cache: Cache, stored: StoredRow, position: int, texts: dict[int, str], top: int) -> dict[str, Any]:
    arrays = cache.kind.decoded(stored.targets)
    here = {name: values[position : position + 1] for name, values in arrays.items()}
    softened = cache.kind.softened(here, 1.0, tail=cache.kind.tail_policies[0])
    ranked = softened.head_ids_Nk.shape[1] if softened.tail is None else cache.kind.vocabulary_size
    ids, probabilities = softened.topk(min(top, ranked))
    return {
        "actual_log_prob": round(float(here["actual_log_prob"][0]), 4),
        "tail_mass": round(math.exp(softened.tail_log_prob_N[0]), 4),
        "top": [
            {"id": token, "text": texts.get(token, f"<{token}>"), "probability": round(probability, 4)}
            for token, probability in zip(ids[0].tolist(), probabilities[0].tolist(), strict=True)
            if probability > 0
        ],
    }


def _find(cache: Cache, row_id: str) -> tuple[Split, int]:
    name, colon, number = row_id.partition(":")
    if colon and name in SPLITS and number.isdigit():
        split: Split = "train" if name == "train" else "held-out"
        if int(number) >= cache.rows_of(split):
            raise CacheError(
                f"there is no row {row_id}: the cache has {cache.rows_of(split)} {split} rows, counted from 0"
            )
        return split, int(number)
    rows: Iterator[tuple[Split, int]] = ((split, index) for split in SPLITS for index in range(cache.rows_of(split)))
    named = ((cache.read_row(*row, columns=()).row.row_id, row) for row in rows)
    matches = list(islice((pair for pair in named if pair[0].startswith(row_id)), 1 if len(row_id) == ID_DIGITS else 2))
    if not matches:
        raise CacheError(f"no row's id begins with {row_id!r}; `--row train:0` shows the first one and its id")
    if len(matches) > 1:
        names = " and ".join(name for name, _ in matches)
        raise CacheError(
            f"more than one row's id begins with {row_id!r}, {names} do; give more digits of the one you mean"
        )
    return matches[0][1]
