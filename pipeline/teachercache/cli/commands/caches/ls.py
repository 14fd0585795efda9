"""`teachercache ls`: the caches that there are."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json
from teachercache.console import run_command


def ls(
    places: Annotated[
        list[str], typer.Argument(metavar="PLACE…", help="folders, URLs of caches, or catalogues (a YAML list of both)")
    ],
    teacher: Annotated[str, typer.Option(metavar="TEXT", help="only those whose teacher's name has this in it")] = "",
    corpus: Annotated[str, typer.Option(metavar="TEXT", help="only those whose corpus has this in its name")] = "",
    target: Annotated[str, typer.Option(metavar="KIND", help="only those that store this, e.g. head+sketch")] = "",
    fingerprint: Annotated[
        str, typer.Option(metavar="HEX", help="only those whose fingerprint, or that of their settings, begins so")
    ] = "",
    as_json: Json = False,
) -> None:
    """List caches: teacher, corpus, targets, sizes, from their manifests alone."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sharing.catalogue import Filter, list_caches

        wanted = Filter(teacher=teacher, corpus=corpus, target=target, fingerprint=fingerprint)
        return {"caches": list_caches(places, wanted)}

    def show(result: dict[str, Any]) -> Any:
        from teachercache.sharing.rendering import caches_table

        return caches_table(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))
