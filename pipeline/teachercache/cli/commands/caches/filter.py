"""`teachercache filter`: some rows of a cache, as a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import WHERE, CacheLocation, Json
from teachercache.console import run_command


def filter_(
    cache: CacheLocation,
    where: Annotated[str, typer.Option(metavar="EXPR", help=WHERE)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache")],
    as_json: Json = False,
) -> None:
    """Make a cache of some rows of another one. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import filter_rows

        return filter_rows(cache, where, to, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
