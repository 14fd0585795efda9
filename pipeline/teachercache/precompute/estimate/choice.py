"""Rows of a sample that the teacher reads within a time: whole batches as the job would form them, spread over all lengths."""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.targets import StoredTargets
from teachercache.teacher import length_sorted_batches
from teachercache.tokens.rows import TokenRow

Batch = list[TokenRow]
LEAST_CALIBRATION = 256  # positions


def batches_of(parts: Sequence[Sequence[TokenRow]], *, positions_per_batch: int) -> list[Batch]:
    """Batches of each part, those of all parts from the longest rows to the shortest."""
    batches = [
        [part[index] for index in indices]
        for part in parts
        for indices in length_sorted_batches(part, positions_per_batch=positions_per_batch)
    ]
    return sorted(batches, key=lambda batch: (-batch[0].length, batch[0].row_id))


def padded_tokens(batches: Sequence[Batch]) -> int:
    """Tokens that a forward pass over each batch reads, padding included."""
    return sum(len(batch) * max(row.length for row in batch) for batch in batches)


def chosen(batches: Sequence[Batch], *, seconds: float, token_seconds: float) -> list[Batch]:
    """As many batches, evenly spaced, as the teacher reads in so many seconds; part of a batch where one takes longer."""
    most = seconds / token_seconds
    count = max(1, min(len(batches), int(len(batches) * most / max(1, padded_tokens(batches)))))
    picked = [batches[int((number + 0.5) * len(batches) / count)] for number in range(count)]
    if count > 1 or padded_tokens(picked) <= most:
        return picked
    batch = picked[0]
    return [batch[: max(1, int(most / max(row.length for row in batch)))]]


def rows_of(batches: Sequence[Batch]) -> list[TokenRow]:
    """Their rows, in order."""
    return [row for batch in batches for row in batch]


def affordable_calibration(targets: StoredTargets, positions: int) -> int:
    """Positions to calibrate with, of which the teacher reads so many in time: as many as the job, or fewer that suffice."""
    wanted, logits = targets.calibration_positions, targets.of_logits
    if getattr(logits, "target_kl", None) is not None:  # which rank is chosen depends on them
        return wanted
    least = max(LEAST_CALIBRATION, 3 * getattr(logits, "rank", 0))
    return min(wanted, max(least, positions))
