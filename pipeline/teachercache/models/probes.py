"""Probes of a loaded model before its numbers are trusted: a few tokens tell what no config says for sure.

Teacher and student alike. Each probe costs two to nine forward passes of at most 32 tokens, and draws nothing at random.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import ModelError
from teachercache.models.loading import input_layout, model_inputs, row_places
from teachercache.models.memory import first_line, free_memory, is_out_of_memory
from teachercache.models.rotary import most_positions, original_context
from teachercache.tasks.contract import Task
from teachercache.tokens.rows import Segment, TokenRow

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Root mean square of a difference, in standard deviations of the logits. A causal model gives the same bits (72 of the zoo's,
# in bfloat16 and float16 as well); one without a mask moves by 2e-3 even when its weights are random and small, and by 5e-3
# in bfloat16. Other shapes, or other expert loads, round differently.
TOLERANCE = {"float32": 5e-4, "float64": 5e-4}
HALF_TOLERANCE = 1e-3
ROUNDING_FACTOR = 3  # half precision: times what a row moves by when the one beside it changes, where that is more
RESHAPED_TOLERANCE = 0.1  # half precision and another shape of batch: routing of experts may flip

LENGTH = 16
# Neighbours: blocks of tokens that see each other, as of block diffusion, cannot end at both, wherever they begin.
EDGES = (8, 7)
SHORT = 8
SHORTEST_CONTEXT = 2048  # of models whose config does not say
PACKED = ((5, 9, 2), (7, 3))  # lengths of the segments of two rows, of which one is padded


def check_sight(model: PreTrainedModel, task: Task, *, name: str, vocabulary_size: int) -> None:
    """Raise `ModelError` for a model that sees what its predictions must not depend on, by its task."""
    if task.is_causal:
        check_causal(model, name=name, vocabulary_size=vocabulary_size)


def check_causal(model: PreTrainedModel, *, name: str, vocabulary_size: int) -> None:
    """Raise `ModelError` for a model whose predictions change with later tokens: its targets would have seen their labels."""
    if sees_later_tokens(model, vocabulary_size=vocabulary_size):
        raise ModelError(
            f"{name} ({type(model).__name__}) sees later tokens: its predictions change with tokens that follow, as those of "
            "masked and bidirectional language models do, so it would be shown every label; use a causal language model"
        )


def sees_later_tokens(model: PreTrainedModel, *, vocabulary_size: int) -> bool:
    """Tells whether logits of the first tokens move when later ones change, or are not there; at two edges.

    On a GPU later tokens change how many rows an expert has at once, and so how the others are rounded: in half precision
    logits must move by more than they do when another row of the batch changes, which they cannot see.
    """
    ids_S = _tokens(LENGTH, vocabulary_size)
    with _evaluated(model):
        whole_SV = _logits(model, [_row(ids_S)])[0]
        return any(_sees_beyond(model, edge, ids_S, whole_SV, vocabulary_size) for edge in EDGES)


def _sees_beyond(
    model: PreTrainedModel, edge: int, ids_S: NDArray[np.int32], whole_SV: Tensor, vocabulary_size: int
) -> bool:
    before = slice(0, edge)
    changed_S = ids_S.copy()
    changed_S[edge:] = (ids_S[edge:] + vocabulary_size // 2 + 1) % vocabulary_size
    whole_SV = whole_SV[before]
    changed_SV, alone_SV = (_logits(model, [_row(row_S)])[0][before] for row_S in (changed_S, ids_S[before]))
    if _differ(whole_SV, alone_SV, reshaped=True):
        return True
    if not _differ(whole_SV, changed_SV, reshaped=False):
        return False
    if str(whole_SV.dtype).removeprefix("torch.") in TOLERANCE:
        return True
    beside, otherwise = (
        _logits(model, [_row(ids_S), _row(row_S)])[0][before] for row_S in (changed_S, ids_S[::-1].copy())
    )
    return _distance(whole_SV, changed_SV) > ROUNDING_FACTOR * _distance(beside, otherwise)


def check_length(model: PreTrainedModel, *, name: str, longest: int) -> None:
    """Raise `ModelError` for a model with fewer positions than the longest row has tokens."""
    positions = most_tokens(model)
    if positions is not None and longest > positions:
        raise ModelError(
            f"{name} ({type(model).__name__}) takes at most {positions} tokens, rows have up to {longest}; "
            "lower sequence.length"
        )


def most_tokens(model: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None for a model whose config does not say, or whose rotary factors grow with a document.

    Where learned positions begin behind a padding one (RoBERTa and kin), those up to it are no token's.
    """
    positions = most_positions(model.config)
    if positions is None:
        return None
    paddings = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max((padding + 1 for padding in paddings), default=0)


def check_rows_alone(model: PreTrainedModel, *, vocabulary_size: int, longest: int) -> None:
    """Raise `ModelError` for a model that computes a short row otherwise beside a long one, as by rotary embeddings of its own
    that scale with the batch. `longest` is the number of tokens in the longest row.

    It costs a forward pass of two rows of that length, without the output projection, and only where rows are longer than any
    model was first trained on.
    """
    if longest <= (original_context(model) or SHORTEST_CONTEXT):
        return
    if not computes_rows_alone(model, vocabulary_size=vocabulary_size, longest=longest):
        raise ModelError(
            f"{type(model).__name__} computes a short row otherwise when a row of {longest} tokens stands beside it, so that "
            "targets would depend on the batch; set sequence.length to the context that the model was first trained on"
        )


def computes_rows_alone(model: PreTrainedModel, *, vocabulary_size: int, longest: int) -> bool:
    """Tells whether a short row's result is the same with a row of `longest` tokens beside it. Raises `ModelError` for
    a model that has no positions for so many."""
    short, long = (_row(_tokens(count, vocabulary_size)) for count in (SHORT, longest))

    def hidden(rows: Sequence[TokenRow]) -> Tensor:
        places, inputs = _inputs(model, rows, layout="documents")
        output = model.base_model(**inputs, use_cache=False)
        hidden_BSD: Tensor = output.logits if model.base_model is model else output[0]
        return hidden_BSD[places[0]]

    with _evaluated(model):
        try:
            return not _differ(hidden([short]), hidden([short, long]), reshaped=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        except IndexError as error:  # learned positions, of which the config does not say how many there are
            raise ModelError(
                f"{type(model).__name__} cannot run a row of {longest} tokens ({first_line(error)}); lower sequence.length"
            ) from error
    free_memory()
    return True  # two such rows never meet here either


def isolates_packed_segments(model: PreTrainedModel, *, vocabulary_size: int) -> bool:
    """Tells whether a model keeps segments of packed rows apart, in a batch of rows of unequal length: each must give
    what it gives alone."""
    rows = [_row(_tokens(sum(lengths), vocabulary_size, first=index), lengths) for index, lengths in enumerate(PACKED)]
    with _evaluated(model):
        try:
            packed = _logits(model, rows, layout="packed")
        except TypeError:  # takes no positions
            return False
        for row, logits_SV in zip(rows, packed, strict=True):
            for start, end in pairwise([*(segment.start for segment in row.segments), row.length]):
                [alone_SV] = _logits(model, [_row(row.input_ids_S[start:end])])
                if _differ(alone_SV, logits_SV[start:end], reshaped=True):
                    return False
    return True


def _logits(model: PreTrainedModel, rows: Sequence[TokenRow], *, layout: str = "documents") -> list[Tensor]:
    """Computes the logits of each row, [S, V]."""
    places, inputs = _inputs(model, rows, layout=layout)
    logits_BSV = model(**inputs, use_cache=False).logits
    return [logits_BSV[place] for place in places]


def _inputs(
    model: PreTrainedModel, rows: Sequence[TokenRow], *, layout: str
) -> tuple[list[tuple[int, slice]], dict[str, Tensor]]:
    """Returns the places of rows, and the arguments of the model's call."""
    import torch

    layout = input_layout(model, layout, longest=max(row.length for row in rows))
    arrays = model_inputs(rows, pad_id=0, layout=layout)
    inputs = {name: torch.from_numpy(values).to(model.device) for name, values in arrays.items()}
    return row_places(rows, layout=layout), inputs


def _differ(one_SV: Tensor, other_SV: Tensor, *, reshaped: bool) -> bool:
    """By more than rounding. Logits that are no numbers say nothing: capture quarantines them."""
    name = str(one_SV.dtype).removeprefix("torch.")
    tolerance = TOLERANCE.get(name, RESHAPED_TOLERANCE if reshaped else HALF_TOLERANCE)
    return _distance(one_SV, other_SV) > tolerance


def _distance(one_SV: Tensor, other_SV: Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    one_SV, other_SV = one_SV.float(), other_SV.float()
    return float((one_SV - other_SV).square().mean().sqrt() / one_SV.std().clamp_min(1e-9))


def _row(ids_S: NDArray[np.int32], lengths: Sequence[int] = ()) -> TokenRow:
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    segments = tuple(Segment("", 0, 0, 0, start) for start in starts)
    return TokenRow("", False, ids_S, np.zeros(len(ids_S), dtype=np.bool_), segments)


def _tokens(count: int, vocabulary_size: int, *, first: int = 0) -> NDArray[np.int32]:
    """From the middle of the vocabulary, where no special tokens are."""
    ids_S = vocabulary_size // 3 + 7 * np.arange(first, first + count)
    return (ids_S % vocabulary_size).astype(np.int32)


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
