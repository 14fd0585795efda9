"""`teachercache verify`: bytes of a cache against its manifest."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from teachercache.cli.options import CacheLocation, Json
from teachercache.console import run_command


def verify(
    cache: CacheLocation,
    quick: Annotated[bool, typer.Option("--quick", help="sizes, schemas and counts only: no hashing")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="also read every row and check what it says; minutes a GB")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a cache against its manifest. Exit status 1: it is not whole."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import verify as check
        from teachercache.cache.storage.source import manifest_of

        problems = check(cache, quick=quick, deep=deep)
        result = {"ok": not problems, "cache": cache, "errors": [vars(problem) for problem in problems]}
        if not problems:
            audit = manifest_of(cache).audit
            result |= {"quarantined": audit.quarantined, "windows_quarantined": audit.windows_quarantined}
        return result

    def show(result: dict[str, Any]) -> Any:
        if result["ok"]:
            lost = result["windows_quarantined"]
            note = f"; {lost:,} windows of stored rows have no targets: quarantine/ says which, and why" if lost else ""
            return Text.assemble(("whole", "green"), f" {cache}{note}")
        lines = [Text.assemble((e["file"], "red"), f": {e['reason']}; {e['remedy']}") for e in result["errors"]]
        return Text("\n").join(lines)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))
