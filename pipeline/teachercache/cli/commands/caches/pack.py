"""`teachercache pack`: a cache in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json
from teachercache.console import run_command
from teachercache.progress import ShownProgress


def pack(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="a folder")],
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="the file to write, NAME.tar.zst")],
    level: Annotated[int, typer.Option(min=1, max=19, help="of zstd; shards are compressed already")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="compress so many blocks at a time; default: all cores")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a cache into one .tar.zst file, hashing all of it on the way. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sharing.archive.packing import pack as pack_cache

        cores = len(os.sched_getaffinity(0))
        with ShownProgress(console, "packing") as progress:
            return pack_cache(cache, archive, level=level, threads=threads or cores, progress=progress)

    def show(result: dict[str, Any]) -> str:
        from teachercache.sharing.rendering import size

        return f"packed {result['files']:,} files, {size(result['bytes'])} → {result['archive']}"

    raise typer.Exit(run_command(work, as_json=as_json, show=show))
