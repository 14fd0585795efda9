"""Additions of the site to docs/: files of the repository that pages link to become pages of the site, as code or Markdown."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = "source"  # the site's folder for files outside docs/
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]+)(#[^)\s]*)?(\)|$)", flags=re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sbatch": "bash", "": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside docs/ that a page links to, and for those that these link to."""
    waiting = [(DOCS / file.src_uri, file.src_uri) for file in files.documentation_pages()]
    made: set[Path] = set()
    while waiting:
        path, _ = waiting.pop()
        for target in _linked(path):
            if target not in made and target.exists() and not _is_page(target):
                made.add(target)
                files.append(File.generated(config, _page_of(target), content=_content(target)))
                if target.suffix == ".md":
                    waiting.append((target, _page_of(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into links to their pages."""
    source = page.file.src_uri
    origin = ROOT / source.removeprefix(f"{SOURCES}/").removesuffix(".page.md") if _is_source(source) else DOCS / source

    def rewritten(match: re.Match[str]) -> str:
        opening, link, anchor, closing = match[1], match[2], match[3] or "", match[4]
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = _resolved(origin, link)
        if not target.exists():
            return match[0]
        page_of_target = target.relative_to(DOCS).as_posix() if _is_page(target) else _page_of(target)
        if target == DOCS:
            page_of_target = "README.md"
        return f"{opening}{posixpath.relpath(page_of_target, posixpath.dirname(source) or '.')}{anchor}{closing}"

    return LINK.sub(rewritten, markdown)


def _is_source(uri: str) -> bool:
    return uri.startswith(f"{SOURCES}/")


def _is_page(target: Path) -> bool:
    return target == DOCS or (target.is_relative_to(DOCS) and target.suffix not in ("", ".py"))


def _resolved(origin: Path, link: str) -> Path:
    return Path(posixpath.normpath((origin.parent / link).as_posix()))


def _linked(path: Path) -> list[Path]:
    text = path.read_text(encoding="utf-8")
    links = [match[2] for match in LINK.finditer(text) if not re.match(r"[a-z]+:", match[2])]
    return [target for link in links if (target := _resolved(path, link)).is_relative_to(ROOT)]


def _page_of(target: Path) -> str:
    return f"{SOURCES}/{target.relative_to(ROOT).as_posix()}.page.md"


def _content(target: Path) -> str:
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        inner = sorted(child.name for child in target.iterdir() if not child.name.startswith(("_", ".")))
        return "\n".join(
            [f"# {name}/", "", "Files of this folder of the repository:", "", *(f"- `{child}`" for child in inner)]
        )
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    return f"# {target.name}\n\n`{name}`\n\n````{LANGUAGES.get(target.suffix, 'text')}\n{text}\n````\n"
