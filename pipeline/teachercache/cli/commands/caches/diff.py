"""`teachercache diff`: in what two caches, or two runs, differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json
from teachercache.console import run_command


def diff(
    left: Annotated[str, typer.Argument(metavar="LEFT", help="a cache (folder or URL), or the folder of a run")],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="another one of the same kind")],
    rows: Annotated[bool, typer.Option("--rows", help="of caches: also count the rows that both hold")] = False,
    as_json: Json = False,
) -> None:
    """Say in what two caches, or two runs, differ, key by key."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sharing.comparison import compare

        return compare(left, right, rows=rows)

    def show(result: dict[str, Any]) -> Any:
        from teachercache.sharing.rendering import comparison_table

        return comparison_table(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))
