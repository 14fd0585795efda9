"""`teachercache inspect`: a cache, or one of its rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import CacheLocation, Json
from teachercache.console import run_command
from teachercache.tables import cache_table, row_table


def inspect(
    cache: CacheLocation,
    row: Annotated[str | None, typer.Option(help="a row's id (or its beginning), or train:0, held-out:3")] = None,
    student: Annotated[str | None, typer.Option(help="with --row: which alignment, where there are several")] = None,
    as_json: Json = False,
) -> None:
    """Show what is inside a cache, or one row token by token."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import Cache
        from teachercache.cache.inspection import describe, describe_row

        opened = Cache.open(cache)
        return describe_row(opened, row, student=student) if row else describe(opened)

    raise typer.Exit(run_command(work, as_json=as_json, show=row_table if row else cache_table))
