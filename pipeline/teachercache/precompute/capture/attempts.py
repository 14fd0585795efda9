"""Attempts: how often a unit was begun, and what was found out meanwhile: `.work/attempts/`, one small file a unit.

Whoever goes on with a unit after a death, of the teacher's process, its actor, the node or the driver, begins where the search
for the row that is to blame was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache.files.bounds import Count
from teachercache.cache.manifest.manifest import WORK_FOLDER
from teachercache.cache.stores.store import Store
from teachercache.precompute.engine.records import read_shaped

ATTEMPTS = f"{WORK_FOLDER}/attempts"
CERTAIN = 2  # times that a row fails alone before it is to blame: whatever ends a process from outside does so once


class Written(TypedDict):
    """One file."""

    run: str
    begun: Count
    suspects: list[str]
    lost: dict[str, str]
    documents: dict[str, str]


SHAPE = TypeAdapter(Written)


@dataclass
class Attempts:
    """Attempts at one unit. `suspects` are rows that were being read when whoever read them ended without a word; `lost` are
    rows that fail alone, `documents` such documents (`unit_tokens.document_key`), by reason."""

    store: Store  # of the cache
    file: str
    run: str  # of the job
    begun: int = 0  # times in this run; more than once where whoever did it died
    suspects: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store, unit: int, *, run: str) -> Attempts:
        """Reads the unit's file, or begins one; a new run counts anew."""
        file = f"{ATTEMPTS}/{unit:05d}.json"
        known = read_shaped(store, file, SHAPE, remedy="delete it and run the same command again")
        if known is None:
            return cls(store, file, run)
        attempts = cls(store, file, **known)
        if attempts.run != run:
            attempts.run, attempts.begun = run, min(attempts.begun, 1)
        return attempts

    def write(self) -> None:
        """Replace the file."""
        values = {name: getattr(self, name) for name in Written.__annotations__}
        self.store.put(self.file, json.dumps(values).encode())


@contextmanager
def marked(store: Store, unit: int) -> Iterator[bool]:
    """False where a task that tokenised this unit ended without a word, so that the unit had better be handed on."""
    mark = f"{ATTEMPTS}/{unit:05d}.tokenising"
    if not store.put_if_absent(mark, b""):
        yield False
        return
    try:
        yield True
    finally:  # not where the process dies
        store.delete(mark)


def isolated(
    items: Sequence[str], attempt: Callable[[Sequence[str]], Exception | None], *, failed: Exception | None = None
) -> dict[str, str]:
    """Items that fail alone, each with the reason, found by halving; `attempt` tells how some items fail together, None where
    they do not. `failed` is how all together have failed already."""
    groups = [tuple(items)] if items else []
    if failed is not None and len(items) > 1:
        groups = _halves(items)
    seen = dict.fromkeys(items, int(failed is not None and len(items) == 1))
    lost = {}
    while groups:
        group = groups.pop()
        failure = attempt(group)
        if failure is None:
            continue
        if len(group) > 1:
            groups += _halves(group)
            continue
        seen[group[0]] += 1
        if seen[group[0]] < CERTAIN:
            groups.append(group)
        else:
            lost[group[0]] = str(failure)
    return lost


def _halves(group: Sequence[str]) -> list[tuple[str, ...]]:
    middle = len(group) // 2
    return [tuple(group[middle:]), tuple(group[:middle])]
