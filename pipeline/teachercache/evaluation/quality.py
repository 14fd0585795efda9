"""Quality of a model: next-token loss, accuracy and agreement with the teacher on the held-out positions of a cache.

Every model is scored on the same positions: those whose target is stored. Padding, prompts of a chat and the last token
of a segment are no positions and are never scored. Distributions run over all columns of a model's logits, as it would be
sampled: those beyond the vocabulary, which no token has, count as mistakes. In float32.

A half-precision model prints logits that are rounded to 8 or 11 bits: ties and swaps among its first choices are the
rounding's, not the model's. So they are taken from what enters its output layer and summed in float32, as a cache's are; a
model whose logits are more than its output layer's is scored by those it prints.

Shapes: B rows, S tokens, N positions of a batch, C positions of a chunk, L columns of the logits, A of what a model
returns: these, or the width of its output layer's input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from teachercache.cache import Cache, StoredRow
from teachercache.cache.alignment import CacheAlignment
from teachercache.errors import CacheError, JobFailed, ModelError
from teachercache.models.loading import input_layout, model_inputs, target_places
from teachercache.models.probes import check_sight
from teachercache.stream.aligned_rows import AlignedPair, chunk_arrays
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.targets.logits.kind import first_choice_tail, first_choices
from teachercache.teacher.output_layer import HALF, OutputLayer, layer_after_body
from teachercache.tokens.rows import TokenRow
from teachercache.tokens.spans import SpanFinder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_POSITIONS = 256
BATCH_TOKENS = 4096  # most tokens in a forward pass, padding included: bounds the logits, which are B · S · V


@dataclass
class Sums:
    """Sums over positions."""

    loss: float = 0.0
    correct: int = 0
    agreeing: int = 0
    compared: int = 0  # positions at which the teacher's choice is known
    positions: int = 0
    bytes: int | None = 0  # of the text that labels stand for; None where the cache keeps no text

    def metrics(self) -> dict[str, float | int | None]:
        """Loss in nats per position, perplexity, bits per byte of text, shares of positions."""
        positions = max(1, self.positions)
        loss = self.loss / positions
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.loss / self.bytes / math.log(2) if self.bytes else None,
            "top1_agreement": self.agreeing / max(1, self.compared),
            "accuracy": self.correct / positions,
            "positions": self.positions,
        }


Row = StoredRow | AlignedPair


def held_out_rows(cache: Cache, *, limit: int | None, alignment: CacheAlignment | None = None) -> list[Row]:
    """The held-out rows, or `limit` of them evenly spread; with an alignment, in a student's tokens. Raises
    `CacheError` where there are none."""
    count = cache.rows_of("held-out")
    if count == 0:
        raise CacheError(
            f"the cache {cache.name} holds no held-out rows to evaluate on; precompute it with corpus.held_out "
            "above 0 (and enough rows that some are chosen)"
        )
    columns = cache.kind.objective_columns(first_choice_tail(cache.kind))
    indices = np.unique(np.linspace(0, count - 1, min(limit or count, count)).round().astype(int))
    rows: list[Row] = []
    for index in indices.tolist():
        stored = cache.read_row("held-out", index, columns=columns)
        if alignment is None:
            rows.append(stored)
        else:
            aligned = alignment.aligned_row("held-out", index, stored)
            rows.append(AlignedPair(aligned.row, stored, aligned.targets))
    return rows


def quality(
    model: PreTrainedModel,
    rows: Sequence[Row],
    cache: Cache,
    *,
    batch_rows: int,
    alignment: CacheAlignment | None = None,
) -> dict[str, float | int | None]:
    """`loss`, `perplexity`, `bits_per_byte` (which compares across tokenizers; None where the cache keeps no text),
    `top1_agreement` (the model's first choice is the teacher's; across tokenizers, where both have read the same bytes),
    `accuracy` (it is the token that follows) and `positions`.

    Raises `ModelError` when the model predicts fewer tokens than the cache's vocabulary has, or sees later tokens; `JobFailed`
    when its loss is not a finite number.
    """
    sums, read = Sums(), cache.manifest if alignment is None else alignment.manifest
    check_sight(model, cache.task, name="the model to evaluate", vocabulary_size=read.vocabulary_size)
    layer = layer_after_body(model) if model.dtype in HALF else None
    if layer is not None and len(layer.matrix_VD) < _outcomes(cache, alignment):
        layer = None  # refused with what it prints
    sums.bytes = label_bytes(rows, cache) if cache.task.labels_are_text else None
    with torch.inference_mode():
        for batch in _batches(rows, batch_rows=batch_rows):
            _score(model, layer, batch, cache, alignment, sums)
    if not math.isfinite(sums.loss):
        raise JobFailed(f"the loss on the held-out rows is {sums.loss}: the model's weights or precision are broken")
    return sums.metrics()


def _outcomes(cache: Cache, alignment: CacheAlignment | None) -> int:
    """Number of outcomes that a model must predict: those of the cache's targets, or the tokens of its own tokenizer."""
    return cache.manifest.outcomes if alignment is None else alignment.manifest.vocabulary_size


def label_bytes(rows: Sequence[Row], cache: Cache) -> int | None:
    """Bytes of the text that all labels of some rows stand for; None where the cache keeps no text."""
    plain = [stored for stored in rows if isinstance(stored, StoredRow)]
    finder = SpanFinder.of(teacher_tokenizer(cache)) if plain else None
    total = 0
    for stored in rows:
        if isinstance(stored, AlignedPair):
            bytes_S = stored.alignment["token_bytes"]
        else:
            assert finder is not None
            text_bytes = _token_bytes(stored.row, finder)
            if text_bytes is None:
                return None
            bytes_S = text_bytes
        total += int(bytes_S[1:][stored.row.target_mask_S[:-1]].sum())
    return total


def _token_bytes(row: TokenRow, finder: SpanFinder) -> NDArray[Any] | None:
    ends = [*(segment.start for segment in row.segments[1:]), row.length]
    parts = []
    for segment, end in zip(row.segments, ends, strict=True):
        spans = None if segment.text is None else finder.spans(segment.text, row.input_ids_S[segment.start : end])
        if spans is None:
            return None
        parts.append(np.diff(spans.ends_S, prepend=0))
    return np.concatenate(parts)


def _batches(rows: Sequence[Row], *, batch_rows: int) -> Iterator[list[Row]]:
    """Rows of like length together, within `BATCH_TOKENS`."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.row.length):
        if batch and (len(batch) == batch_rows or (len(batch) + 1) * row.row.length > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(
    model: PreTrainedModel,
    layer: OutputLayer | None,
    batch: Sequence[Row],
    cache: Cache,
    alignment: CacheAlignment | None,
    sums: Sums,
) -> None:
    rows, manifest = [stored.row for stored in batch], cache.manifest if alignment is None else alignment.manifest
    layout = input_layout(model, cache.manifest.layout, longest=max(row.length for row in rows))
    arrays = model_inputs(rows, pad_id=manifest.pad_id, layout=layout, is_causal=cache.task.is_causal)
    inputs = {name: torch.from_numpy(values).to(model.device) for name, values in arrays.items()}
    if layer is not None:
        outputs_RA = model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)
    else:
        outputs_RA = model(**inputs, use_cache=False).logits.flatten(0, 1)
        if outputs_RA.shape[-1] < _outcomes(cache, alignment):
            raise ModelError(
                f"the model predicts {outputs_RA.shape[-1]} tokens, but the tokenizer of its rows has "
                f"{_outcomes(cache, alignment)}; evaluate a model with the teacher's tokenizer, or an aligned one"
            )
    positions_N = target_places(rows, layout=layout, width=inputs["input_ids"].shape[1])
    labels_N = np.concatenate([cache.task.labels_N(row) for row in rows])
    teacher_N = np.concatenate([_teachers_choices(stored, cache, alignment) for stored in batch])
    tensors = [
        torch.from_numpy(array.astype(np.int64)).to(outputs_RA.device) for array in (positions_N, labels_N, teacher_N)
    ]
    for positions_C, labels_C, teacher_C in zip(*(tensor.split(CHUNK_POSITIONS) for tensor in tensors), strict=True):
        outputs_CA = outputs_RA[positions_C]
        _add(sums, layer.logits(outputs_CA) if layer else outputs_CA.float(), labels_C, teacher_C)


def _teachers_choices(stored: Row, cache: Cache, alignment: CacheAlignment | None) -> NDArray[Any]:
    """At each position, in the model's own ids; -1 where the teacher has none to compare."""
    if isinstance(stored, StoredRow):
        own_N: NDArray[Any] = first_choices(cache.kind, cache.kind.decoded(stored.targets), xp=np)
        return own_N
    assert alignment is not None
    choices_N = np.full(stored.row.positions, -1, dtype=np.int64)
    arrays, chunks = chunk_arrays([stored], cache.targets, tuple(stored.teacher.targets))
    choices_N[chunks["first"]] = alignment.vocabulary.first_Vt[first_choices(cache.kind, arrays, xp=np)]
    return choices_N


def _add(sums: Sums, logits_CL: Tensor, labels_C: Tensor, teacher_C: Tensor) -> None:
    choice_C = logits_CL.argmax(-1)
    sums.loss += float(F.cross_entropy(logits_CL, labels_C, reduction="sum"))
    sums.correct += int((choice_C == labels_C).sum())
    sums.agreeing += int((choice_C == teacher_C).sum())
    sums.compared += int((teacher_C >= 0).sum())
    sums.positions += len(labels_C)
