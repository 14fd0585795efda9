"""`teachercache merge`: caches joined into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json
from teachercache.console import run_command


def merge(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE…", help="folders or URLs, two or more")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache")],
    as_json: Json = False,
) -> None:
    """Join caches of equal settings into a new one, each row once. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import merge as join

        return join(caches, to, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
