"""Write the generated pages and tables: `python infra/docs_site/generate.py`. A test says where a page is behind the code."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "infra"), str(ROOT / "pipeline")]

from docs_site import commands, errors, recipe, results  # noqa: E402


def generated() -> dict[Path, str]:
    """Every page that is generated, in whole or in part, and its text."""
    reference = ROOT / "docs" / "reference"
    pages = {
        reference / "recipe.md": recipe.page() + "\n",
        reference / "commands.md": commands.page() + "\n",
        reference / "errors.md": errors.page(ROOT / "pipeline" / "teachercache") + "\n",
    }
    for path in sorted((ROOT / "docs" / "results").glob("*.md")):
        pages[path] = results.filled(path.read_text(encoding="utf-8"), ROOT)
    return pages


def main() -> None:
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
