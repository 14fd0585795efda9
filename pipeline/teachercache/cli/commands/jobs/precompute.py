"""`teachercache precompute`: a cache from a teacher and a corpus."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides, RecipePath
from teachercache.config import load_recipe
from teachercache.console import run_command


def precompute(
    recipe: RecipePath,
    limit: Annotated[int | None, typer.Option(min=1, help="read at most so many rows of the corpus")] = None,
    recheck_corpus: Annotated[
        bool, typer.Option("--recheck-corpus", help="read the corpus again, though its files look as they did")
    ] = False,
    recheck: Annotated[
        bool,
        typer.Option(
            "--recheck", help="read back all that is finished, not only some of it, before an unfinished job goes on"
        ),
    ] = False,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Run a teacher over a corpus and store what a student can learn from. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.job import run_precompute

        extra = [f"corpus.limit={limit}"] if limit else []
        loaded = load_recipe(recipe, [*overrides, *extra])
        return run_precompute(loaded, console=console, recheck_corpus=recheck_corpus, recheck=recheck)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
