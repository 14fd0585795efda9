"""The rows of a record batch, checked when it is first read: ids outside the vocabulary, columns that contradict each other.

All of it is a `ValueError` here; readers name the file. What a batch costs in memory is bounded before it is decompressed
(ipc_blocks.py), what a row's column costs before it is decoded (targets/coding/columns.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teachercache.cache.shards.row_batch import numbers, offsets


def check_rows(batch: pa.RecordBatch, *, vocabulary_size: int, longest: int, first: int, held_out_from: int) -> None:
    """Raise `ValueError` for a record batch whose rows cannot be; `first` is the index of its first row in the shard.

    Costs about 0.2 ms a batch, which holds the rows of about 1 MiB of targets.
    """
    check_values(batch, first)
    if pc.count_distinct(batch.column("row_id")).as_py() < batch.num_rows:
        raise ValueError("two rows have the same row_id")
    lengths = _lengths(batch.column("input_ids"))
    if lengths.min() < 1 or lengths.max() > longest:
        raise ValueError(f"a row has {lengths.min()} or {lengths.max()} tokens, between 1 and {longest} are possible")
    tokens = _flat(batch, "input_ids")
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise ValueError(f"input_ids hold {tokens.min()} or {tokens.max()}, of {vocabulary_size} tokens")
    held_out = numbers(batch.column("held_out"))
    if (held_out != (np.arange(first, first + len(held_out)) >= held_out_from)).any():
        raise ValueError("rows are not on the side, held out or not, that the manifest counts them on")
    marked = _check_masks(batch, lengths)
    if marked[np.cumsum(lengths) - 1].any():
        raise ValueError("the last token of a segment has a target")
    if "segments" in batch.schema.names:  # else they are not asked for
        _check_segments(batch, lengths, marked)


def check_values(batch: pa.RecordBatch, first: int) -> None:
    """Raise `ValueError` for a record batch whose columns are not what Arrow can read, or lack a value."""
    batch.validate(full=True)  # offsets and text: Arrow itself reads wherever they say
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            raise ValueError(f"column {name} has no value in some row")


def _check_masks(batch: pa.RecordBatch, lengths: Any) -> Any:
    """The flat target mask, bool."""
    if (_lengths(batch.column("target_mask")) != lengths).any():
        raise ValueError("a row's target_mask is not as long as its input_ids")
    marked = _flat(batch, "target_mask")
    ends = np.cumsum(lengths)
    counted = np.diff(np.cumsum(marked)[ends - 1], prepend=0)
    if (counted != numbers(batch.column("positions"))).any():
        raise ValueError("a row's positions are not those that its target_mask marks")
    return marked


def _check_segments(batch: pa.RecordBatch, lengths: Any, marked: Any) -> None:
    """Segments begin at the row's first token, follow each other within it, and end in a token without a target."""
    segments = batch.column("segments")
    counts, fields = _lengths(segments), segments.flatten()
    if counts.min() < 1 or fields.null_count:
        raise ValueError("a row has no segment")
    for index in range(fields.type.num_fields):
        if fields.field(index).null_count and fields.type.field(index).name != "text":
            raise ValueError(f"a segment has no {fields.type.field(index).name}")
    starts = numbers(fields.field("start")).astype(np.int64)
    firsts = np.cumsum(counts) - counts
    rising = np.diff(starts) > 0
    rising[firsts[1:] - 1] = True
    if starts[firsts].any() or not rising.all() or (starts >= np.repeat(lengths, counts)).any():
        raise ValueError("segments do not follow each other within their row")
    begins, finishes, occurrences = (numbers(fields.field(n)) for n in ("byte_start", "byte_end", "occurrence"))
    if begins.min() < 0 or (begins > finishes).any() or occurrences.min() < 0:
        raise ValueError("a segment's span of bytes cannot be")
    if fields.type.get_field_index("contents") >= 0:  # shards of earlier caches have none
        _check_contents(fields.field("contents"), finishes - begins)
    row_starts = np.cumsum(lengths) - lengths
    last_tokens = np.append(np.repeat(row_starts, counts) + starts, len(marked))[1:] - 1
    if marked[last_tokens].any():
        raise ValueError("the last token of a segment has a target")


def _check_contents(contents: Any, sizes: Any) -> None:
    """Contents of messages ascend within the bytes of their segment."""
    counts, fields = _lengths(contents), contents.flatten()
    if not len(fields):
        return
    if fields.null_count or any(fields.field(index).null_count for index in range(fields.type.num_fields)):
        raise ValueError("a content of a segment has no role, start or end")
    starts, ends = (numbers(fields.field(name)).astype(np.int64) for name in ("start", "end"))
    before = np.append(0, ends[:-1])
    before[(np.cumsum(counts) - counts)[counts > 0]] = 0
    if (starts < before).any() or (ends <= starts).any() or (ends > np.repeat(sizes, counts)).any():
        raise ValueError("contents of messages do not follow each other within their segment")


def _lengths(lists: pa.ListArray) -> Any:
    return np.diff(offsets(lists)).astype(np.int64)


def _flat(batch: pa.RecordBatch, name: str) -> Any:
    values = batch.column(name).flatten()
    if values.null_count:
        raise ValueError(f"column {name} has an entry without a value")
    return numbers(values)
