"""`run_precompute`: a cache from a recipe, new, resumed, or with what came to the recipe and its corpus since."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from teachercache.cache.manifest.manifest import GROWTH, MANIFEST, read_manifest
from teachercache.cache.stores.lease import leased
from teachercache.cache.stores.local import LocalStore
from teachercache.config import Recipe, is_url
from teachercache.errors import RecipeError
from teachercache.files import full_disk_in_a_line
from teachercache.precompute.capture.job import aligned
from teachercache.precompute.capture.job import run_precompute as run_capture
from teachercache.precompute.engine.termination import ending_in_a_line


def run_precompute(
    recipe: Recipe, *, console: Console, recheck_corpus: bool = False, recheck: bool = False
) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that `--json` prints.

    A cache that is finished is left as it is; with `precompute.grow` the rows and the layers that it lacks are added.
    `recheck_corpus` and `recheck` as of `capture.job.run_precompute`. Raises as that and `growth.job.grow` do.
    """
    if is_url(recipe.cache) and recipe.precompute.grow:
        raise RecipeError(
            f"cache: {recipe.cache} is in an object store, and a cache grows in a folder: copy it into one, let it grow there, "
            "and copy it back, manifest.json last"
        )
    if is_url(recipe.cache) or not _may_grow(recipe):
        return run_capture(recipe, console=console, recheck_corpus=recheck_corpus, recheck=recheck)
    from teachercache.precompute.growth.job import check_unchanged, grow

    folder, tell = Path(recipe.cache), partial(console.print, markup=False)
    with (
        ending_in_a_line(),
        full_disk_in_a_line(folder),
        leased(LocalStore(folder), job="precompute job", tell=tell),
    ):
        if recipe.precompute.grow:
            result = grow(recipe, console=console, run=partial(run_capture, console=console, recheck=recheck))
        else:
            result = check_unchanged(recipe, console=console)
    return aligned(recipe, result, console=console)


def _may_grow(recipe: Recipe) -> bool:
    """Tells whether there is a finished cache, and more than its corpus and this recipe may have gone into it."""
    folder = Path(recipe.cache)
    return (folder / MANIFEST).is_file() and (recipe.precompute.grow or _has_grown(folder))


def _has_grown(folder: Path) -> bool:
    """Tells whether a cache is one of several, or is about to be: its corpus alone does not tell what it holds."""
    return (folder / GROWTH).is_dir() or ((folder / MANIFEST).is_file() and bool(read_manifest(folder).parents))
