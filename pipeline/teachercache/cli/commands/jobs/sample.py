"""`teachercache sample`: a corpus of a student's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides, RecipePath
from teachercache.config import load_recipe
from teachercache.console import run_command


def sample(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="the new corpus, JSON lines")],
    student: Annotated[str | None, typer.Option(help="who writes; default: the recipe's trained student")] = None,
    rows: Annotated[int, typer.Option(min=1, help="at most so many samples")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="how much of a document the student is given")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens that it adds")] = 224,
    temperature: Annotated[float, typer.Option(help="of sampling; 1 is what the student would say")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="samples at a time")] = 16,
    seed: Annotated[int, typer.Option(help="draws other documents, and other samples")] = 0,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Let a student go on from beginnings of the recipe's corpus: a corpus of its own text, for another `precompute`."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sampling.job import run_sampling

        return run_sampling(
            load_recipe(recipe, overrides), out=out, student=student, rows=rows, prompt_tokens=prompt_tokens,
            new_tokens=new_tokens, temperature=temperature, batch=batch, seed=seed, console=console,
        )  # fmt: skip

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))
