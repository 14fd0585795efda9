"""Checkpoints whose bytes are not those that were written: a run goes on from one before, or says in a line that it cannot."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from teachercache.config import Recipe
from teachercache.errors import RecipeError, TeachercacheError
from teachercache.training.checkpoints.completion import MARKER, complete_checkpoints, marked_checkpoints, set_aside
from teachercache.training.job.train import run_training
from training.runs import log_of, start_job

SETTINGS: dict[str, Any] = {"save_every": 3, "evaluate_every": 9, "keep_checkpoints": 9, "zero_stage": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture
def stopped(written: Path, make_recipe: Any, tmp_path: Path) -> Recipe:
    """A run that was killed after step 6 of 9, with whole checkpoints of steps 3 and 6; what it comes to is in `written`."""
    if not (written / "whole").exists():
        run_training(make_recipe(output=written / "whole", **SETTINGS))
        _cut_back(Path(shutil.copytree(written / "whole", written / "stopped")))
    shutil.copytree(written / "stopped", tmp_path / "run")
    return make_recipe(output=tmp_path / "run", **SETTINGS)


def _cut_back(run: Path) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    shutil.rmtree(run / "checkpoint-9")


def _assert_as_if_whole(recipe: Recipe, written: Path) -> None:
    assert recipe.train is not None
    ours, theirs = recipe.train.output, written / "whole"
    name = "student/model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert log_of(ours) == log_of(theirs)


def _ends_well_or_in_a_line(recipe: Recipe, written: Path) -> str:
    """The outcome: the same weights as if nothing had been damaged, or an error of one line."""
    console = Console(file=io.StringIO())
    try:
        run_training(recipe, console=console)
    except TeachercacheError as error:
        assert "\n" not in str(error)
        return str(error)
    _assert_as_if_whole(recipe, written)
    return console.file.getvalue()  # type: ignore[attr-defined]


Damage = Callable[[Path, random.Random], Any]


def _flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def _swap(path: Path, generator: random.Random) -> None:
    """Another file of the checkpoint in its place."""
    others = [
        each for each in sorted(path.parent.iterdir()) if each.is_file() and each.read_bytes() != path.read_bytes()
    ]
    shutil.copyfile(generator.choice(others), path)


DAMAGES: dict[str, Damage] = {
    "flip": _flip,
    "truncated": lambda path, generator: path.write_bytes(
        path.read_bytes()[: generator.randrange(path.stat().st_size)]
    ),
    "longer": lambda path, generator: path.write_bytes(path.read_bytes() + generator.randbytes(8)),
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path, generator: path.write_bytes(generator.randbytes(path.stat().st_size)),
    "empty": lambda path, _: path.write_bytes(b""),
    "missing": lambda path, _: path.unlink(),
    "another file": _swap,
    "a pipe": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a link to zeros": lambda path, _: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
}
MARKERS = [
    "",
    "{",
    "[]",
    "null",
    "{}",
    '{"world_size": "1"}',
    '{"world_size": 0}',
    '{"world_size": 1, "files": {}}',
    "\xff",
]


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_optimizer_is_left_for_the_checkpoint_before(stopped: Recipe, written: Path, damage: str) -> None:
    run = stopped.train.output
    [path] = (run / "checkpoint-6").glob("global_step6/*optim_states.pt")
    DAMAGES[damage](path, random.Random(0))
    said = _ends_well_or_in_a_line(stopped, written)
    reason = {"flip": "differs from its sha256", "missing": "is missing"}[damage]
    name = path.relative_to(run / "checkpoint-6")
    assert (
        f"checkpoint-6 is damaged ({name} {reason}): going on from the one before it\nresuming at step 3 of 9" in said
    )
    assert [path.name for path in run.glob("damaged-*")] == ["damaged-checkpoint-6"]
    assert (run / "damaged-checkpoint-6" / "model.safetensors").is_file(), "what is whole in it is kept"


def test_one_damaged_checkpoint_is_kept(stopped: Recipe) -> None:
    run = stopped.train.output
    for step in (6, 3):
        [checkpoint] = [each for each in marked_checkpoints(run) if each.step == step]
        assert set_aside(checkpoint) == run / f"damaged-checkpoint-{step}"
        assert [path.name for path in run.glob("damaged-*")] == [f"damaged-checkpoint-{step}"]
    assert not marked_checkpoints(run)


def test_damage_of_every_checkpoint_ends_in_a_line(stopped: Recipe) -> None:
    run = stopped.train.output
    (run / "checkpoint-6" / MARKER).write_text("")
    _flip(run / "checkpoint-3" / "model.safetensors", random.Random(0))
    with pytest.raises(
        TeachercacheError, match="no undamaged checkpoint to go on from .checkpoint-6: .*checkpoint-3: "
    ):
        run_training(stopped)
    assert [each.step for each in marked_checkpoints(run)] == [3, 6], "nothing is deleted"


@pytest.mark.parametrize("text", MARKERS)
def test_a_marker_that_is_none_counts_as_damage(stopped: Recipe, text: str) -> None:
    run = stopped.train.output
    (run / "checkpoint-6" / MARKER).write_bytes(text.encode("latin-1"))
    assert [each.step for each in complete_checkpoints(run)] == [3]
    assert [bool(each.damage) for each in marked_checkpoints(run)] == [False, True]


@pytest.mark.parametrize("what", ["a pipe", "a link to zeros", "a folder"])
def test_a_marker_that_is_no_regular_file_counts_as_damage(stopped: Recipe, what: str) -> None:
    run = stopped.train.output
    DAMAGES[what](run / "checkpoint-6" / MARKER, random.Random(0))
    assert [bool(each.damage) for each in marked_checkpoints(run)] == [False, True]


def test_checkpoints_of_an_earlier_version_are_resumed_from_with_a_line(stopped: Recipe, written: Path) -> None:
    for folder in stopped.train.output.glob("checkpoint-*"):
        (folder / MARKER).write_text(json.dumps({"world_size": 1}))
    said = _ends_well_or_in_a_line(stopped, written)
    assert (
        "checkpoint-6 has no digests, an earlier version wrote it: its bytes are not checked\nresuming at step 6"
        in said
    )


def test_weights_that_are_to_be_exported_are_checked(stopped: Recipe, written: Path) -> None:
    """Checkpoints of a run that was killed between its last step and its export."""
    run = stopped.train.output
    shutil.copytree(written / "whole" / "checkpoint-9", run / "checkpoint-9")
    _flip(run / "checkpoint-9" / "model.safetensors", random.Random(1))
    said = _ends_well_or_in_a_line(stopped, written)
    assert "checkpoint-9 is damaged" in said and "resuming at step 6" in said


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x00", '{"recipe": 1}'])
def test_a_run_that_no_longer_says_whose_it_is_ends_in_a_line(stopped: Recipe, text: str) -> None:
    (stopped.train.output / "run.json").write_text(text)
    with pytest.raises(RecipeError, match=r"run.json.*") as caught:
        run_training(stopped)
    assert "\n" not in str(caught.value)


def _hit(run: Path, number: int) -> str:
    """Damage a run in one of many ways; returns how."""
    generator = random.Random(number)
    folders = ["checkpoint-6", "checkpoint-6", "checkpoint-6", "checkpoint-3", "."]
    folder = run / generator.choice(folders)
    found = [path for path in folder.rglob("*") if path.is_file()] if folder != run else [run / "run.json"]
    path, damage = generator.choice(sorted(found)), generator.choice(sorted(DAMAGES))
    if path.name == MARKER and generator.random() < 0.5:
        path.write_bytes(generator.choice(MARKERS).encode("latin-1"))
        return f"{path}: other marker"
    DAMAGES[damage](path, generator)
    return f"{path}: {damage}"


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 100))])
def test_whatever_is_damaged_the_weights_are_the_same_or_a_line_says_so(
    stopped: Recipe, written: Path, number: int
) -> None:
    how = _hit(stopped.train.output, number)
    print(how, "->", _ends_well_or_in_a_line(stopped, written))


@pytest.mark.slow
def test_several_processes_agree_on_what_is_damaged(make_recipe: Any, tmp_path: Path) -> None:
    """Each looks at its share of the files; all go back together."""
    whole, hit = (make_recipe(output=tmp_path / name, **SETTINGS) for name in ("whole", "hit"))
    assert start_job(whole, tmp_path, processes=2).wait() == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "hit")
    _cut_back(tmp_path / "hit")
    shards = sorted((tmp_path / "hit" / "checkpoint-6" / "global_step6").glob("*optim_states.pt"))
    assert len(shards) == 2
    _flip(shards[1], random.Random(3))
    job = start_job(hit, tmp_path, processes=2)
    errors = job.communicate()[1]
    assert job.returncode == 0 and "checkpoint-6 is damaged" in errors and "resuming at step 3" in errors
    _assert_as_if_whole(hit, tmp_path)
