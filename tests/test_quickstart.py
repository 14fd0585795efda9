"""Files and choices of the quickstart before its stages run; the stages have tests of their own."""

import json
from pathlib import Path

import pytest

from teachercache.config import load_recipe
from teachercache.errors import RecipeError
from teachercache.quickstart import LAYERS, next_commands, student_arguments, write_recipe


@pytest.mark.parametrize("name", ["plain", "q #b", "q: a", "deep/[bold]", "'é\""])
def test_the_recipe_lies_below_any_folder(tmp_path, name):
    out = tmp_path / name
    path, recipe = write_recipe(out, [])
    assert path == out / "recipe.yaml" and load_recipe(path) == recipe
    assert recipe.cache == out / "cache" and recipe.train.output == out / "run"
    assert Path(recipe.student.model) == out / "student-init"
    assert "jobs/recipes/quickstart.yaml" in path.read_text().splitlines()[0]


def test_overrides_are_part_of_the_recipe_that_is_left(tmp_path):
    path, recipe = write_recipe(tmp_path, ["train.epochs=1", "corpus.limit=3"])
    assert load_recipe(path) == recipe and recipe.train.epochs == 1 and recipe.corpus.limit == 3
    assert recipe.cache == tmp_path / "cache" and path.read_text().startswith("#")
    with pytest.raises(RecipeError):
        write_recipe(tmp_path, ["train.epoch=1"])


def test_a_student_is_made_again_unless_it_is_the_same(tmp_path):
    _, recipe = write_recipe(tmp_path, [])
    wanted = [recipe.teacher.model, "--layers", LAYERS, "--out", str(tmp_path / "student-init")]
    assert student_arguments(tmp_path, recipe) == wanted
    (tmp_path / "student-init").mkdir()
    (tmp_path / "student-init" / "config.json").write_text("{}")
    marker = tmp_path / "student-init.json"
    for content in (None, "{", json.dumps({"model": "another", "layers": LAYERS})):
        if content is not None:
            marker.write_text(content)
        assert student_arguments(tmp_path, recipe) == [*wanted, "--overwrite"]
    marker.write_text(json.dumps({"model": recipe.teacher.model, "layers": LAYERS}))
    assert student_arguments(tmp_path, recipe) == []


def test_a_student_of_the_users_own_is_never_replaced(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    _, recipe = write_recipe(tmp_path / "out", [f"student.model={own}"])
    assert student_arguments(tmp_path / "out", recipe) == []


def test_next_commands_can_be_typed_as_they_are():
    result = {"recipe": "q #b/recipe.yaml", "cache": "q #b/cache", "student": "[/x]", "seconds": {"train": 60.0}}
    shown = next_commands(result).plain
    assert "Done in 1.0 min." in shown and "[/x]" in shown
    assert "inspect 'q #b/cache' --row" in shown and "train 'q #b/recipe.yaml' -s train.output='q #b'/run-t2" in shown
