"""`TERMS`: the class of each loss between layers, and the term that a recipe describes, for one cache and student."""

from __future__ import annotations

from typing import Any

from teachercache.config import LayerTermConfig
from teachercache.config.layer_losses import LAYER_LOSSES, LayerLoss
from teachercache.objective.layers.attention import AttentionTerm
from teachercache.objective.layers.hidden import HiddenTerm
from teachercache.objective.layers.pairs import layer_pairs
from teachercache.objective.layers.relations import RelationTerm
from teachercache.objective.layers.structure import StructureTerm
from teachercache.objective.layers.term import LayerTerm, StudentShape
from teachercache.targets import StoredTargets

_CLASSES: tuple[type[Any], ...] = (HiddenTerm, AttentionTerm, RelationTerm, StructureTerm)
TERMS: dict[str, type[Any]] = {match: term for term in _CLASSES for match in term.matches}


def register_layer_loss(loss: LayerLoss, term: type[Any]) -> None:
    """Add a loss from outside the package: `loss.config` is what a recipe says of it, `term` the class (`LayerTerm`) that
    computes it. Raises `ValueError` for a name of the package's own."""
    LAYER_LOSSES.register(loss)
    TERMS[loss.name] = term


def term_of(config: LayerTermConfig, targets: StoredTargets, student: StudentShape) -> LayerTerm:
    """The term that a recipe describes. Raises `CacheError` where cache and student do not fit it."""
    term = TERMS[config.match]
    targets.check_known(term.of)
    kind: Any = getattr(targets, term.of)
    pairs = layer_pairs(
        config.pairs,
        () if kind is None else kind.layers,
        what=term.of,
        student_blocks=student.blocks,
        teacher_blocks=0 if kind is None else kind.blocks,
    )
    assert kind is not None
    fitted: LayerTerm = term.fitted(config, pairs, targets=targets, student=student)
    return fitted
