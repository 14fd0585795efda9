"""A problem: the finding of a check of a cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it."""

    file: str
    reason: str
    remedy: str
