"""The term that a recipe describes, for one cache and student. The losses are listed in config/layer_losses.py."""

from __future__ import annotations

from typing import Any

from teachercache.config import LayerTermConfig
from teachercache.config.layer_losses import LAYER_LOSSES
from teachercache.objective.layers.pairs import layer_pairs
from teachercache.objective.layers.term import LayerTerm, StudentShape
from teachercache.targets import StoredTargets


def term_of(config: LayerTermConfig, targets: StoredTargets, student: StudentShape) -> LayerTerm:
    """The term that a recipe describes. Raises `CacheError` where cache and student do not fit it."""
    term = LAYER_LOSSES[config.match].term_class()
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
