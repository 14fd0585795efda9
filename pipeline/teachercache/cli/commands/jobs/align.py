"""`teachercache align`: a cache for a student with another tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import CacheLocation, Json
from teachercache.console import run_command


def align(
    cache: CacheLocation,
    student: Annotated[
        str, typer.Option(metavar="ID", help="a model whose tokenizer the student has: hub id or folder")
    ],
    revision: Annotated[str | None, typer.Option(help="hub commit, tag or branch")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local one")] = None,
    as_json: Json = False,
) -> None:
    """Make a cache fit for a student with another tokenizer, on CPUs, without the teacher. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.align.job import run_align

        return run_align(cache, student=student, revision=revision, address=address, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
