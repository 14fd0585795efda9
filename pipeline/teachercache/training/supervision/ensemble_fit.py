"""Checks that caches can teach together: everything that is refused before the first step, each in a line with its
remedy."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from teachercache.cache import Cache
from teachercache.cache.reader import SPLITS
from teachercache.cache.storage.source import TEACHER
from teachercache.config import TeachersConfig
from teachercache.errors import CacheError, RecipeError
from teachercache.stream.alignment import alignment_for
from teachercache.stream.ensemble_rows import TeacherCache
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.training.supervision.teacher_losses import held_out_of_all

TRIED_ROWS = 8  # of each further cache, read before training


def priors_of(config: TeachersConfig, names: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """The recipe's weights in rows of each of a run's own caches. Raises `RecipeError` for domains that none is called."""
    for name in config.domains:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the run's own caches are {', '.join(names)}"
            raise RecipeError(f"teachers.domains names {name}, which is no folder of `cache` or stream.mix; {hint}")
        if list(names).count(name) > 1:
            raise RecipeError(f"teachers.domains names {name}, and two caches are called so; rename a folder")
    return tuple(config.domains.get(name, config.shares()) for name in names)


def check_distinct(own_caches: Sequence[Cache], caches: Sequence[Cache]) -> None:
    """Raise `CacheError` where a cache is there twice."""
    met = {cache.manifest.fingerprint: cache.name for cache in own_caches}
    for cache in caches:
        same = met.get(cache.manifest.fingerprint)
        if same is not None:
            raise CacheError(f"teachers.caches: {cache.name} is the same cache as {same}; take it out")
        met[cache.manifest.fingerprint] = cache.name


def matched(own_caches: Sequence[Cache], cache: Cache) -> TeacherCache:
    """A further teacher's cache, its rows found; of one with another tokenizer, through its alignment.

    Raises `CacheError` where there is none, or the same text has other tokens.
    """
    alignment = None
    if cache.manifest.tokenizer_fingerprint != own_caches[0].manifest.tokenizer_fingerprint:
        first = own_caches[0]
        name = first.manifest.teacher["model"] if first.is_remote else str(first.folder / TEACHER)
        alignment = alignment_for(cache, teacher_tokenizer(own_caches[0]), student=name)
    matched = TeacherCache.matched_to(own_caches, cache, alignment=alignment)
    _check_tokens(own_caches, matched)
    return matched


def _check_tokens(own_caches: Sequence[Cache], other: TeacherCache) -> None:
    """Raise `CacheError` where the same text has other tokens in the first rows that are looked at."""
    tried = same = 0
    for source, cache in enumerate(own_caches):
        for split in SPLITS:
            for index in np.flatnonzero(other.rows[source][split] >= 0)[:TRIED_ROWS].tolist():
                row = cache.read_row(split, index, columns=(), segments=False).row
                other_row = other.read(source, split, index, row_id=row.row_id, columns=())
                tried += 1
                same += other_row is not None and np.array_equal(other_row.row.input_ids_S, row.input_ids_S)
    if tried and not same:
        raise CacheError(
            f"teachers: {other.cache.name} has other tokens for the text of {own_caches[0].name}, in all of {tried} rows; "
            "precompute both with one chat template and the same sequence settings"
        )


def _nothing_in_common(cache: Cache, other: Cache) -> str:
    packed = "packed" in (cache.manifest.layout, other.manifest.layout)
    remedy = (
        "packed rows match only where they were packed alike: precompute both with sequence.layout: documents"
        if packed
        else "precompute it from the same corpus, with the same sequence.length"
    )
    return f"teachers: {other.name} has none of the rows to train on of {cache.name}; {remedy}"


def check_missing(own_caches: Sequence[Cache], other_teachers: Sequence[TeacherCache], *, policy: str) -> None:
    """Raise `CacheError` for a cache without a row to train on, or, where the recipe refuses that, lacking one."""
    for other in other_teachers:
        if not other.found("train"):
            raise CacheError(_nothing_in_common(own_caches[0], other.cache))
        lacking = [
            (cache, cache.rows_of("train") - other.found("train", source=source))
            for source, cache in enumerate(own_caches)
        ]
        cache, count = max(lacking, key=lambda pair: pair[1])
        if policy == "refuse" and count:
            raise CacheError(
                f"teachers: {other.cache.name} lacks {count} of the {cache.rows_of('train')} rows to train on of "
                f"{cache.name}; precompute it from all of its text, or set teachers.missing to others or skip"
            )


def check_held_out(own_caches: Sequence[Cache], other_teachers: Sequence[TeacherCache], *, weights: str) -> None:
    """Raise `CacheError` where there is no row to validate on."""
    if not len(held_out_of_all(own_caches, other_teachers)):
        lacking = [cache.name for cache in own_caches[:1] if not cache.rows_of("held-out")]
        lacking = lacking or [
            other.cache.name for other in other_teachers if not len(held_out_of_all(own_caches, [other]))
        ]
        whose = f"in {lacking[0]}" if lacking else "that are in all of them at once"
        raise CacheError(
            f"teachers.weights: {weights} needs held-out rows of {own_caches[0].name} that all caches have, and there are none "
            f"{whose}; precompute the caches from one corpus with a larger corpus.held_out, or use weights: fixed or confidence"
        )
