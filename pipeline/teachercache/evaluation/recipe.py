"""The comparison table of a recipe, or of the folder that a training run left."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from teachercache.cache import Cache, Manifest
from teachercache.cache.manifest.snapshots import named
from teachercache.config import Recipe, StudentConfig, load_recipe, parse_recipe
from teachercache.errors import CacheError, RecipeError
from teachercache.evaluation.table import ModelSpec, Table, evaluate
from teachercache.stream.beginnings import warnings_of

RUN_FILE = "run.json"


def run_evaluation(
    recipe_or_run: str | Path,
    *,
    teacher: str | None = None,
    cross_entropy: str | Path | None = None,
    rows: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Table:
    """Compare the teacher, the recipe's student as it was, and the student that training exported; `cross_entropy` is the run
    folder of one that was trained without the teacher.

    `recipe_or_run` is a YAML recipe or `train.output`. The teacher is `teacher`, else the recipe's, else the one that
    the cache names. Raises `RecipeError` when there is no trained student, `CacheError` when it was trained on
    another cache.
    """
    recipe = _read(Path(recipe_or_run), overrides)
    recipe.require("student", "train")
    assert recipe.student is not None and recipe.train is not None
    runs = [recipe.train.output, *([] if cross_entropy is None else [Path(cross_entropy)])]
    students = [_student_of(run) for run in runs]
    trained_on = _recorded(runs[0])["cache_fingerprint"] if (runs[0] / RUN_FILE).is_file() else None
    stream = recipe.stream
    cache = Cache.open(recipe.cache, local=stream.local, local_bytes=stream.local_bytes, as_of=trained_on)
    for run in runs:
        _check_cache(run, cache)
    if progress:
        for line in warnings_of([cache]):
            progress(line)
    before, trained = student_specs(recipe.student, students[0])
    beside = [student_specs(recipe.student, student)[1] for student in students[1:]]
    return evaluate(
        cache=named(recipe.cache, cache.manifest.fingerprint) if cache.is_snapshot else recipe.cache,
        teacher=_teacher(teacher, recipe, cache.manifest),
        student_before=before,
        student_after=trained,
        student_cross_entropy=beside[0] if beside else None,
        rows=rows,
        device=device,
        local=recipe.stream.local,
        local_bytes=recipe.stream.local_bytes,
        progress=progress,
    )


def student_specs(student: StudentConfig, after: Path) -> tuple[ModelSpec, ModelSpec]:
    """The student as it was and as it is, both with the attention that it was trained with."""
    before = ModelSpec(student.model, revision=student.revision, attention=student.attention)
    return before, ModelSpec(str(after), attention=student.attention)


def _student_of(run: Path) -> Path:
    student = run / "student"
    if not (student / "config.json").is_file():
        raise RecipeError(f"there is no trained student at {student}; run `teachercache train` with this recipe first")
    return student


def _read(path: Path, overrides: Sequence[str]) -> Recipe:
    if not path.is_dir():
        return load_recipe(path, overrides)
    if not (path / RUN_FILE).is_file():
        raise RecipeError(f"{path} is no run folder: it has no {RUN_FILE}; give a recipe, or the train.output of one")
    recipe = parse_recipe(_recorded(path)["recipe"], origin=str(path / RUN_FILE))
    # The folder may have moved since: what lies in it counts, not where it was written.
    return recipe.model_copy(update={"train": recipe.train and recipe.train.model_copy(update={"output": path})})


def _recorded(run: Path) -> dict[str, Any]:
    """Reads the record of a run that training wrote: its `recipe`, and the `cache_fingerprint` of its cache."""
    try:
        data = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
        return {key: data[key] for key in ("recipe", "cache_fingerprint")}
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{run / RUN_FILE} does not hold a run; delete it, and give the recipe") from None


def _check_cache(run: Path, cache: Cache) -> None:
    """Students are compared on rows that training held out, which those of another cache are not."""
    if (run / RUN_FILE).is_file() and _recorded(run)["cache_fingerprint"] != cache.manifest.fingerprint:
        raise CacheError(
            f"the student in {run} was trained on another cache than {cache.name} is now; "
            "train one on this cache, with another train.output"
        )


def _teacher(name: str | None, recipe: Recipe, manifest: Manifest) -> ModelSpec:
    """In the precision that the cache was captured in, whatever its name."""
    captured = {"dtype": manifest.teacher.get("dtype", "auto"), "attention": manifest.teacher.get("attention")}
    if name is None and recipe.teacher is not None:
        options = recipe.teacher.model_dump(include={"model", "revision", "trust_remote_code"})
        return ModelSpec(**options, **captured)
    return ModelSpec(
        name or manifest.teacher["model"], revision=None if name else manifest.teacher.get("revision"), **captured
    )
