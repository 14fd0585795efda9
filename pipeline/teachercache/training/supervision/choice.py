"""Choice of a run's supervision: made here, for a recipe and for caches that are given from Python alike."""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import ObjectiveConfig, Recipe, TeachersConfig
from teachercache.config.location import folder_name
from teachercache.errors import RecipeError
from teachercache.objective.objective_schedule import ScheduleRange
from teachercache.training.supervision.contract import Supervision
from teachercache.training.supervision.ensemble import Teachers
from teachercache.training.supervision.other_tokens import OtherTokens
from teachercache.training.supervision.own_tokens import OwnTokens
from teachercache.training.supervision.several_teachers import SeveralTeachers
from teachercache.training.supervision.tokenizers import alignments_of


def supervision_for(recipe: Recipe, caches: Sequence[Cache]) -> Supervision:
    """Chooses what the recipe's student learns from in its caches.

    Raises `CacheError` where a cache has no alignment with the student's tokenizer, and what `Teachers.of` raises.
    """
    assert recipe.student is not None
    alignments = alignments_of(recipe.student, caches)
    if recipe.teachers is None:
        return supervision_of(caches, recipe.objective, alignments=alignments)
    if alignments:
        raise _both_at_once()
    return supervision_of(caches, recipe.objective, teachers=_teachers(recipe, recipe.teachers, caches))


def _teachers(recipe: Recipe, config: TeachersConfig, caches: Sequence[Cache]) -> Teachers:
    if not ScheduleRange.of(recipe.objective, recipe.phases).uses_teacher:
        raise RecipeError("teachers: objective.alpha is 0, so nothing is learned from them; leave teachers out")
    stream = recipe.stream
    others = [Cache.open(entry.cache, local=stream.local, local_bytes=stream.local_bytes) for entry in config.caches]
    names = [folder_name(location) for location in (recipe.cache, *(entry.cache for entry in stream.mix))]
    return Teachers.of(config, caches, others, names=names)


def supervision_of(
    caches: Sequence[Cache],
    objective: ObjectiveConfig,
    *,
    alignments: Sequence[CacheAlignment] = (),
    teachers: Teachers | None = None,
) -> Supervision:
    """Chooses what a student learns from in the caches of a run: through `alignments`, one a cache, where it has
    another tokenizer than the teacher; from `teachers` of the same rows besides, where these are given.

    Raises `RecipeError` for both.
    """
    if alignments and teachers is not None:
        raise _both_at_once()
    if alignments:
        return OtherTokens(caches, objective, alignments=alignments)
    if teachers is not None:
        return SeveralTeachers(caches, objective, teachers=teachers)
    return OwnTokens(caches, objective)


def _both_at_once() -> RecipeError:
    return RecipeError(
        "teachers: the student has another tokenizer than `cache`; give as `cache` one of the student's tokenizer and align "
        "the others with it, or leave teachers out"
    )
