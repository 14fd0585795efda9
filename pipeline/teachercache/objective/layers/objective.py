"""The terms of `objective.layers` against the layers that one cache stores.
Shapes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.errors import ModelError
from teachercache.objective.layers.aligned import FIRST, PLACES, STUDENT, aligned_heads, are_aligned, at_tokens
from teachercache.objective.layers.gradient_taps import GradientTaps
from teachercache.objective.layers.term import LayerBatch, StudentShape, hidden_arrays
from teachercache.objective.layers.terms import term_of
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import TaughtAttention
from teachercache.targets.layers.hidden_states import column_of
from teachercache.tasks.contract import NO_TARGET

if TYPE_CHECKING:
    from teachercache.models.activations import Activations


@dataclass(frozen=True)
class LayerLossSums:
    """Sums over the positions of a micro-batch: `total` with weights and gradient, `terms` of each term without its weight
    and `similarity` of cosines by the student's layer, both detached."""

    total: Tensor
    terms: dict[str, Tensor]
    similarity: dict[int, Tensor]


class LayerObjective(torch.nn.Module):
    """The terms of a recipe against the layers of one cache. It holds the adapters: make it a part of what is trained.

    `columns` are those of the cache that it reads; `hidden_layers` and `attention_layers` those of the student that must be
    recorded. Raises `CacheError` for layers, heads or widths that do not fit, before anything is computed.
    """

    def __init__(self, terms: Sequence[LayerTermConfig], targets: StoredTargets, student: StudentShape) -> None:
        super().__init__()
        self._targets = targets
        self._centred = [term.centred for term in terms]
        made = [term_of(config, targets, student) for config in terms]
        self._made, self.terms = (
            made,
            torch.nn.ModuleList(cast(list[torch.nn.Module], made)),
        )  # the list alone forgets what they are
        self._means: dict[tuple[int, str], Tensor] = {}  # no buffers: training casts those to half precision
        self.names = names_of(terms)
        pairs = [(term.of, pair) for term in made for pair in term.pairs]
        self.hidden_layers, self.attention_layers = (
            tuple(sorted({ours for what, (ours, _) in pairs if what == of})) for of in ("hidden", "attention")
        )
        self._teacher_hidden, self._teacher_attention = (
            tuple(sorted({theirs for what, (_, theirs) in pairs if what == of})) for of in ("hidden", "attention")
        )
        read = [column_of(layer) for layer in self._teacher_hidden]
        for layer in self._teacher_attention:
            assert targets.attention is not None
            read += targets.attention.columns_of(layer)
        self.columns = tuple(dict.fromkeys(read))

    @property
    def similarities(self) -> tuple[int, ...]:
        """Layers of the student whose similarity with the teacher's is measured."""
        return tuple(sorted({ours for term in self._made if term.measures_similarity for ours, _ in term.pairs}))

    @property
    def least_segments(self) -> dict[str, int]:
        """Segments that a micro-batch must have for each term, by `names`."""
        return {name: term.least_segments for name, term in zip(self.names, self._made, strict=True)}

    def loss(
        self,
        activations: Activations,
        layers: Mapping[str, Tensor],
        shift_labels_BS: Tensor,
        *,
        weights: Mapping[str, float],
        taps: GradientTaps | None = None,
    ) -> LayerLossSums:
        """`activations` of the student (`activations.Activations`), `layers` as the collator gives them, and the weights that
        terms have in this step, by `names`. In float32, also under autocast. With `taps` the backward pass leaves each term's
        gradient there; what was recorded must be `apart`. Raises `ModelError` where what was recorded carries no gradient
        though it should."""
        with torch.autocast(shift_labels_BS.device.type, enabled=False):
            return self._loss(activations, layers, shift_labels_BS, weights, taps)

    def _loss(
        self,
        activations: Activations,
        layers: Mapping[str, Tensor],
        shift_labels_BS: Tensor,
        weights: Mapping[str, float],
        taps: GradientTaps | None,
    ) -> LayerLossSums:
        _check_gradients(activations)
        batches = {
            centred: self._batch(activations, layers, shift_labels_BS, centred) for centred in set(self._centred)
        }
        values = []
        for name, term, centred in zip(self.names, self._made, self._centred, strict=True):
            batch = batches[centred]
            if taps is not None:
                term_batch = self._batch(taps.apart(name, term, activations), layers, shift_labels_BS, centred)
                batch = replace(term_batch, similarity=batch.similarity)
            values.append(term.loss(batch))
        total = torch.stack([weights[name] * value for name, value in zip(self.names, values, strict=True)]).sum()
        similarity = {layer: sums for batch in batches.values() for layer, sums in batch.similarity.items()}
        terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        return LayerLossSums(total, terms, similarity)

    def _batch(
        self, activations: Activations, layers: Mapping[str, Tensor], shift_labels_BS: Tensor, centred: bool
    ) -> LayerBatch:
        segment_BS = layers["segment"]
        hidden = {}
        for layer in self._teacher_hidden:
            hidden[layer] = layers[column_of(layer)]
            if centred:
                hidden[layer] = hidden[layer] - self._mean(layer, hidden[layer])
        mask_BS = shift_labels_BS != NO_TARGET
        student_hidden, student_heads = activations.hidden, activations.attention
        if are_aligned(layers):
            index_BA = layers[STUDENT]
            mask_BS = mask_BS.gather(1, index_BA) & (segment_BS >= 0)
            student_hidden = {
                layer: at_tokens(hidden_BSD, index_BA, dim=1) for layer, hidden_BSD in student_hidden.items()
            }
            student_heads = {
                layer: aligned_heads(heads, index_BA, layer=layer) for layer, heads in student_heads.items()
            }
        first_BS = layers[FIRST] > 0 if are_aligned(layers) else _positions(segment_BS) == 0
        attention = self._taught_attention(layers, segment_BS)
        return LayerBatch(mask_BS, segment_BS, first_BS, student_hidden, student_heads, hidden, attention)

    def _taught_attention(self, layers: Mapping[str, Tensor], segment_BS: Tensor) -> dict[int, TaughtAttention]:
        kind, position_BS = self._targets.attention, layers.get(PLACES)
        if kind is None:
            return {}
        place_BS = _positions(segment_BS) if position_BS is None else position_BS
        return {layer: kind.stored_heads(torch, layer, layers, place_BS) for layer in self._teacher_attention}

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, by all weights, in the order of `loss`: what a process does whose micro-batch is of another cache."""
        with torch.autocast(like.device.type, enabled=False):
            return sum((term.zero_contribution(like) for term in self._made), like.new_zeros(()))

    def _mean(self, layer: int, like: Tensor) -> Tensor:
        """On the device of a tensor; copied there once."""
        key = (layer, str(like.device))
        if key not in self._means:
            self._means[key] = like.new_tensor(hidden_arrays(self._targets, layer)["mean"])
        return self._means[key]


def names_of(terms: Sequence[LayerTermConfig]) -> tuple[str, ...]:
    """Returns the names of terms in logs: what they match, numbered from the second of a kind on."""
    names: list[str] = []
    for term in terms:
        before = sum(name.partition(".")[0] == term.match for name in names)
        names.append(f"{term.match}.{before + 1}" if before else term.match)
    return tuple(names)


def _check_gradients(activations: Activations) -> None:
    hidden = [values.requires_grad for values in activations.hidden.values()]
    attention = [heads.queries_BHSE.requires_grad for heads in activations.attention.values()]
    if torch.is_grad_enabled() and not (any(hidden or [True]) and any(attention or [True])):
        raise ModelError(
            "the student's layers carry no gradient, so that objective.layers would teach it nothing: gradient checkpointing "
            "must not be reentrant (gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def _positions(segment_BS: Tensor) -> Tensor:
    """Returns the position of each token in its segment, from 0; padding counts on."""
    index_S = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    begins_BS = torch.ones_like(segment_BS, dtype=torch.bool)
    begins_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    starts_BS = torch.where(begins_BS, index_S, 0).cummax(1).values
    return index_S - starts_BS


__all__ = ["LayerLossSums", "LayerObjective", "StudentShape", "hidden_arrays", "names_of", "term_of"]
