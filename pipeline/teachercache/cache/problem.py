"""A problem: the finding of a check of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.errors import one_line


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it."""

    file: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("file", "reason", "remedy"):  # each is a line
            object.__setattr__(self, name, one_line(getattr(self, name)))
