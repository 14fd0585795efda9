"""The terms of `objective.layers` against the layers that one cache stores. `term_of` is where terms are dispatched.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.errors import CacheError, ModelError
from teachercache.objective.layers.aligned import FIRST, PLACES, STUDENT, aligned_heads, are_aligned, at_tokens
from teachercache.objective.layers.attention import AttentionTerm
from teachercache.objective.layers.gradient_taps import GradientTaps
from teachercache.objective.layers.hidden import HiddenTerm
from teachercache.objective.layers.pairs import layer_pairs
from teachercache.objective.layers.relations import PARTS, RelationTerm, check_relation_heads
from teachercache.objective.layers.structure import STRUCTURES, StructureTerm
from teachercache.objective.layers.term import LayerBatch
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention_maps import AttentionMaps
from teachercache.targets.layers.hidden_states import column_of

NO_TARGET = -100


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a student that decide its adapters."""

    blocks: int
    width: int
    heads: int
    key_heads: int
    head_width: int


@dataclass(frozen=True)
class LayerLoss:
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
        self._made, self.terms = made, torch.nn.ModuleList(made)  # the list alone forgets what they are
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
            read += targets.attention.columns_of(layer)
        self.columns = tuple(dict.fromkeys(read))

    @property
    def similarities(self) -> tuple[int, ...]:
        """Layers of the student whose similarity with the teacher's is measured."""
        return tuple(sorted({ours for term in self.terms if isinstance(term, HiddenTerm) for ours, _ in term.pairs}))

    def loss(
        self,
        activations: Any,
        layers: Mapping[str, Tensor],
        shift_labels_BS: Tensor,
        *,
        weights: Mapping[str, float],
        taps: GradientTaps | None = None,
    ) -> LayerLoss:
        """`activations` of the student (`activations.Activations`), `layers` as the collator gives them, and the weights that
        terms have in this step, by `names`. In float32, also under autocast. With `taps` the backward pass leaves each term's
        gradient there; what was recorded must be `apart`. Raises `ModelError` where what was recorded carries no gradient
        though it should."""
        with torch.autocast(shift_labels_BS.device.type, enabled=False):
            return self._loss(activations, layers, shift_labels_BS, weights, taps)

    def _loss(
        self,
        activations: Any,
        layers: Mapping[str, Tensor],
        shift_labels_BS: Tensor,
        weights: Mapping[str, float],
        taps: GradientTaps | None,
    ) -> LayerLoss:
        _check_gradients(activations)
        batches = {
            centred: self._batch(activations, layers, shift_labels_BS, centred) for centred in set(self._centred)
        }
        values = []
        for name, term, centred in zip(self.names, self._made, self._centred, strict=True):
            batch = batches[centred]
            if taps is not None:
                own = self._batch(taps.apart(name, term, activations), layers, shift_labels_BS, centred)
                batch = replace(own, similarity=batch.similarity)
            values.append(term.loss(batch))
        total = torch.stack([weights[name] * value for name, value in zip(self.names, values, strict=True)]).sum()
        similarity = {layer: sums for batch in batches.values() for layer, sums in batch.similarity.items()}
        terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        return LayerLoss(total, terms, similarity)

    def _batch(
        self, activations: Any, layers: Mapping[str, Tensor], shift_labels_BS: Tensor, centred: bool
    ) -> LayerBatch:
        segment_BS = layers["segment"]
        hidden = {}
        for layer in self._teacher_hidden:
            hidden[layer] = layers[column_of(layer)]
            if centred:
                hidden[layer] = hidden[layer] - self._mean(layer, hidden[layer])
        mask_BS, position_BS = shift_labels_BS != NO_TARGET, layers.get(PLACES)
        student_hidden, student_heads = activations.hidden, activations.attention
        if are_aligned(layers):
            index_BA = layers[STUDENT]
            mask_BS = mask_BS.gather(1, index_BA) & (segment_BS >= 0)
            student_hidden = {layer: at_tokens(found, index_BA, dim=1) for layer, found in student_hidden.items()}
            student_heads = {
                layer: aligned_heads(heads, index_BA, layer=layer) for layer, heads in student_heads.items()
            }
        attention = {
            layer: self._targets.attention.stored_heads(
                torch, layer, layers, _positions(segment_BS) if position_BS is None else position_BS
            )
            for layer in self._teacher_attention
        }
        first_BS = layers[FIRST] > 0 if are_aligned(layers) else _positions(segment_BS) == 0
        return LayerBatch(mask_BS, segment_BS, first_BS, student_hidden, student_heads, hidden, attention)

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


def term_of(config: LayerTermConfig, targets: StoredTargets, student: StudentShape) -> Any:
    """The term that a recipe describes, for one cache and student. Raises `CacheError` where they do not fit."""
    of_hidden = config.match.startswith("hidden-") or config.match in STRUCTURES
    targets.check_known("hidden" if of_hidden else "attention")
    kind: Any = targets.hidden if of_hidden else targets.attention
    pairs = layer_pairs(
        config.pairs,
        () if kind is None else kind.layers,
        what="hidden" if of_hidden else "attention",
        student_blocks=student.blocks,
        teacher_blocks=0 if kind is None else kind.blocks,
    )
    assert kind is not None
    if of_hidden:
        widths = {"student_width": student.width, "teacher_width": kind.width}
        if config.match in STRUCTURES:
            return StructureTerm(config.match, pairs, **widths)
        arrays = {layer: hidden_arrays(targets, layer) for _, layer in pairs}
        variance = {layer: float((found["spread"] ** 2).mean()) for layer, found in arrays.items()}
        means = {layer: torch.from_numpy(found["mean"]) for layer, found in arrays.items()} if config.centred else {}
        shared = config.adapter == "shared"
        return HiddenTerm(config.match, pairs, **widths, variance=variance, means=means, shared=shared)
    if config.match in PARTS:
        return _relation_term(config, kind, student, pairs)
    counts = {"student_heads": student.heads, "teacher_heads": kind.heads}
    return AttentionTerm(config.match, pairs, heads=config.heads, first_key=config.first_key, **counts)


def _relation_term(config: LayerTermConfig, kind: Any, student: StudentShape, pairs: Any) -> RelationTerm:
    if isinstance(kind, AttentionMaps):
        raise CacheError(
            f"objective.layers match {config.match}, but the cache keeps attention maps, not the vectors that relations are "
            "among; precompute it with targets.attention.kind: relations, or match attention-kl"
        )
    if config.match == "value-relations" and not kind.values:
        raise CacheError(
            "objective.layers match value-relations, but the cache keeps no values; precompute it with "
            "targets.attention.values: true"
        )
    of_queries = config.match == "query-relations"
    heads = config.relation_heads or (student.heads if of_queries else student.key_heads)
    counts = {"student": student.heads, "teacher": kind.heads} if of_queries else {}
    counts = counts or {"student": student.key_heads, "teacher": kind.key_heads}
    widths = {"student": student.head_width, "teacher": kind.head_width}
    check_relation_heads(heads, **{whose: count * widths[whose] for whose, count in counts.items()})
    return RelationTerm(config.match, pairs, relation_heads=heads)


def hidden_arrays(targets: StoredTargets, layer: int) -> dict[str, Any]:
    """Mean and spread of a layer's channels over the corpus."""
    assert targets.hidden is not None and targets.hidden.layer_file is not None
    arrays = targets.hidden.layer_file.arrays
    return {name: arrays[f"hidden.{layer}.{name}"] for name in ("mean", "spread")}


def _check_gradients(activations: Any) -> None:
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


__all__ = ["LayerLoss", "LayerObjective", "StudentShape", "hidden_arrays", "names_of", "term_of"]
