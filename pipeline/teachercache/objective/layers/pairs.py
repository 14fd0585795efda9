"""Pairs of layers: which layer of the student learns from which layer of the teacher.

    uniform   each stored layer t with the student's layer nearest to t · Ls / Lt, of Lt and Ls blocks; of several that are
              nearest to one layer of the student, the one that is nearest
    first     layer i with layer i
    last      counted from the end: the student's last block with the teacher's
    {3: 6}    said: the student's layer 3 with the teacher's 6

Layers are numbered as in `teachercache.models.activations`: 0 is the embeddings, i what block i gives, or its
attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from teachercache.errors import CacheError

Rule = Literal["uniform", "first", "last"] | Mapping[int, int]


def layer_pairs(
    rule: Rule, stored: Sequence[int], *, what: str, student_blocks: int, teacher_blocks: int
) -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's layer), rising. `what` is hidden or attention.

    Raises `CacheError` for a layer that is not stored or that the student does not have.
    """
    if not stored:
        raise CacheError(
            f"objective.layers match {what} states, but the cache stores none; precompute it with targets.{what}, or leave "
            "these terms out"
        )
    least = 0 if what == "hidden" else 1
    if isinstance(rule, Mapping):
        pairs = sorted(rule.items())
    elif rule == "uniform":
        pairs = _uniform(stored, least=least, student_blocks=student_blocks, teacher_blocks=teacher_blocks)
    else:
        shift = 0 if rule == "first" else teacher_blocks - student_blocks
        pairs = [(layer - shift, layer) for layer in stored]
    for student, teacher in pairs:
        if teacher not in stored:
            raise CacheError(
                f"objective.layers match {what} layer {teacher} of the teacher, which is not stored (stored are "
                f"{', '.join(map(str, stored))}); choose pairs of stored ones"
            )
        if not least <= student <= student_blocks:
            raise CacheError(
                f"objective.layers match {what} layer {teacher} of the teacher with the student's {student}, but the student "
                f"has {student_blocks} blocks; choose pairs by hand, e.g. pairs: {{{student_blocks}: {teacher}}}"
            )
    return tuple(pairs)


def _uniform(stored: Sequence[int], *, least: int, student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
    nearest: dict[int, tuple[int, int]] = {}
    for layer in stored:
        place = layer * student_blocks  # in units of 1 / teacher_blocks of the student's layers
        student = max(least, (2 * place + teacher_blocks) // (2 * teacher_blocks))
        distance = abs(place - student * teacher_blocks)
        if student not in nearest or distance <= nearest[student][0]:
            nearest[student] = (distance, layer)
    return sorted((student, layer) for student, (_, layer) in nearest.items())
