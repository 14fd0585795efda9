"""`teachercache unpack`: a cache out of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json
from teachercache.console import run_command
from teachercache.progress import ShownProgress


def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="a file that `pack` wrote")],
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="the folder to write")],
    as_json: Json = False,
) -> None:
    """Unpack a cache, every file compared with its digest. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sharing.archive.unpacking import unpack as unpack_cache

        with ShownProgress(console, "unpacking") as progress:
            return unpack_cache(archive, cache, progress=progress)

    def show(result: dict[str, Any]) -> str:
        return f"unpacked {result['files']:,} files, {result['rows']:,} rows → {result['cache']}"

    raise typer.Exit(run_command(work, as_json=as_json, show=show))
