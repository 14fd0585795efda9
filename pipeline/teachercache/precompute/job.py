"""`run_precompute`: a cache from a recipe, new, resumed, or with what came to the recipe and its corpus since."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from teachercache.cache.manifest.manifest import GROWTH, MANIFEST, read_manifest
from teachercache.config import Recipe
from teachercache.files import full_disk_in_a_line, locked
from teachercache.precompute.capture.job import aligned, lock_file
from teachercache.precompute.capture.job import run_precompute as run_capture
from teachercache.precompute.engine.termination import ending_in_a_line


def run_precompute(
    recipe: Recipe, *, console: Console, recheck_corpus: bool = False, recheck: bool = False
) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that `--json` prints.

    A cache that is finished is left as it is; with `precompute.grow` the rows and the layers that it lacks are added.
    `recheck_corpus` and `recheck` as of `capture.job.run_precompute`. Raises as that and `growth.job.grow` do.
    """
    folder = recipe.cache_folder
    if not (recipe.precompute.grow or _has_grown(folder)) or not (folder / MANIFEST).is_file():
        return run_capture(recipe, console=console, recheck_corpus=recheck_corpus, recheck=recheck)
    from teachercache.precompute.growth.job import check_unchanged, grow

    with (
        ending_in_a_line(),
        full_disk_in_a_line(folder),
        locked(lock_file(folder), job="precompute job", folder=folder),
    ):
        if recipe.precompute.grow:
            result = grow(recipe, console=console, run=partial(run_capture, console=console, recheck=recheck))
        else:
            result = check_unchanged(recipe, console=console)
    return aligned(recipe, result, console=console)


def _has_grown(folder: Path) -> bool:
    """Tells whether a cache is one of several, or is about to be: its corpus alone does not tell what it holds."""
    return (folder / GROWTH).is_dir() or ((folder / MANIFEST).is_file() and bool(read_manifest(folder).parents))
