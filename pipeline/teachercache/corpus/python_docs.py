"""CPython's own help topics: real English technical prose that every Python carries, so that a first run needs no network.

Some topics are chapters whose sections are topics of their own. A held-out section inside a chapter that is trained on
would make every student look good, so topics that mostly repeat a longer one are left out: 56 of CPython 3.11's 79
remain, 370 kB.
"""

from __future__ import annotations

import re

REPEATED = 0.2  # a topic with so large a share of paragraphs from longer topics is left out
_SHORT = 60  # characters; paragraphs below it (headings, rules) are the same everywhere and say nothing


def python_topics() -> list[str]:
    """Texts of the topics that stand for themselves, in the order of their names."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = _paragraphs(topics[name])
        if paragraphs and len(paragraphs & seen) < REPEATED * len(paragraphs):
            kept.append(name)
            seen |= paragraphs
    return [topics[name] for name in sorted(kept)]


def _paragraphs(text: str) -> set[str]:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {part for part in parts if len(part) > _SHORT}
