"""A power cut at any moment of a job: the same command makes the same cache of whatever is on the disk then."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from teachercache.cache import verify
from teachercache.config import Recipe
from teachercache.precompute.align.job import run_align
from teachercache.precompute.capture.job import run_precompute
from teachercache.precompute.capture.plan import make_plan

from builders import aligned, build_cache, other_student, sentences, tiny_recipe, tiny_teacher
from power_loss import HAS_STRACE, laid_out, recorded, states

ROOT = Path(__file__).parents[3]
SKETCH = {"logits": {"kind": "head+sketch", "k": 4, "rank": 4, "step": 0.1, "calibration_positions": 100}}
SOME = 12  # of the states, in the share that always runs

needs_strace = pytest.mark.skipif(not HAS_STRACE, reason="file operations are recorded with strace; install it")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher", layers=1)


def recipe_of(folder: Path, teacher: Path) -> Recipe:
    return tiny_recipe(folder, teacher=teacher, texts=[*sentences(11), ""], targets=SKETCH, precompute={"unit_rows": 6})


def contents(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def recorded_job(code: str, folder: Path, *arguments: str) -> list[dict[str, bytes | None]]:
    """States that a power cut may leave of a folder, over all moments of some code of the tests."""
    before = {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "pipeline"), str(ROOT / "tests")])}
    operations = recorded(
        [sys.executable, "-c", code, *arguments],
        below=folder,
        environment=environment,
        log=folder.parent / "strace.log",
    )
    (folder.parent / "strace.log").unlink()
    return states(operations, folder, before=before)


JOB = """
import sys
from pathlib import Path
from builders import build_cache
from teachercache.config import load_recipe
build_cache(load_recipe(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def left(tmp_path_factory, teacher) -> list[dict[str, bytes | None]]:
    import yaml

    folder = tmp_path_factory.mktemp("recorded") / "job"
    recipe = recipe_of(folder, teacher)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return recorded_job(JOB, folder, str(folder / "recipe.yaml"))


def assert_mended(left: list[dict[str, bytes | None]], folder: Path, teacher: Path) -> None:
    undisturbed = contents(build_cache(recipe_of(folder / "undisturbed", teacher)))
    for number, state in enumerate(left):
        recipe = recipe_of(folder / f"{number}", teacher)
        laid_out(state, folder / f"{number}")
        cache = Path(recipe.cache)
        if "cache/manifest.json" in state:
            assert verify(cache) == [], f"state {number}"
            run_precompute(recipe, console=Console(quiet=True))  # nothing is left to do that needs Ray
        else:
            finished = {int(Path(name).stem) for name in state if name.startswith("cache/.work/done/0")}
            assert not (finished and finished & set(make_plan(recipe).pending())), (
                f"state {number}: what was recorded is lost"
            )
            build_cache(recipe)
        assert contents(cache) == undisturbed, f"state {number}"
        assert verify(cache) == []


@needs_strace
def test_a_power_cut_loses_nothing_at_some_moments(left, tmp_path, teacher):
    assert len(left) > 80
    assert_mended(left[5 :: len(left) // SOME], tmp_path, teacher)


@needs_strace
@pytest.mark.slow
def test_a_power_cut_loses_nothing_at_any_moment(left, tmp_path, teacher):
    assert_mended(left, tmp_path, teacher)


ALIGN = """
import sys
from pathlib import Path
from builders import aligned
aligned(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@needs_strace
@pytest.mark.slow
def test_a_power_cut_loses_nothing_at_any_moment_of_an_alignment(tmp_path, teacher):
    cache = build_cache(recipe_of(tmp_path / "made", teacher))
    student = other_student(tmp_path / "student")
    (tmp_path / "recorded").mkdir()
    shutil.copytree(cache, tmp_path / "recorded" / "cache")
    left = recorded_job(ALIGN, tmp_path / "recorded", str(tmp_path / "recorded" / "cache"), str(student))
    aligned(cache, student)
    assert len(left) > 30
    for number, state in enumerate(left):
        laid_out(state, tmp_path / f"{number}")
        again = tmp_path / f"{number}" / "cache"
        if any(name.endswith("/alignment.json") for name in state):
            assert verify(again) == [], f"state {number}"
            run_align(again, student=str(student), console=Console(quiet=True))  # nothing is left to do that needs Ray
        else:
            aligned(again, student)
        assert contents(again) == contents(cache), f"state {number}"
