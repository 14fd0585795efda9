"""The pages that people read, as tests ask for them: text, links and anchors of Markdown."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "infra/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "pipeline").rglob("*.md")),
]
_FENCE = re.compile(r"^( *)(```+)(.*?)\n(.*?)^\1\2 *$", flags=re.DOTALL | re.MULTILINE)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for _, _, name, body in _FENCE.findall(text_of(page)) if name.strip() == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks and code."""
    return re.sub(r"`[^`\n]+`", "code", _FENCE.sub("", text_of(page)))


def links(page: Path) -> list[str]:
    """Targets of a page's links, inline and by reference, without those to other machines."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r"^\[[^\]]+\]: (\S+)", prose(page), re.MULTILINE)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> set[str]:
    """Headings of a page, which `#…` may name, as GitHub and the site write them."""
    text = re.sub(r"`([^`\n]+)`", r"\1", _FENCE.sub("", text_of(page)))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
