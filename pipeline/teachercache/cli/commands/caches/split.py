"""`teachercache split`: a cache parted in two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import WHERE, CacheLocation, Json
from teachercache.console import run_command


def split(
    cache: CacheLocation,
    where: Annotated[str, typer.Option(metavar="EXPR", help=WHERE)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache of the rows that it holds of")],
    rest: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache of all others")],
    as_json: Json = False,
) -> None:
    """Part a cache in two: the rows that an expression holds of, and all others. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import split as part

        return part(cache, where, to, rest, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
