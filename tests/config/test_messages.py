"""A mistake in a recipe is said where it is, and what may stand there."""

from __future__ import annotations

from typing import Any

import pytest

from teachercache.config import parse_recipe
from teachercache.errors import RecipeError


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"targets": {"hidden": {"layers": [1], "codec": "x"}}}, "`targets.hidden.codec`: input should be 'int8'"),
        ({"targets": {"hidden": {}}}, "`targets.hidden.layers` is missing"),
        ({"targets": {"hidden": {"layers": [1], "sted": 1}}}, "unknown key `targets.hidden.sted`; did you mean `step`?"),
        ({"targets": {"logits": {"kind": "hidden", "step": -1}}}, "`targets.logits.step`: input should be greater"),
        ({"targets": {"logits": {"kind": "x"}}}, "`targets.logits`: its `kind` must be one of 'head+sketch', 'top-k'"),
        ({"objective": {"alpha": {"schedule": "x"}}}, "`objective.alpha`: must be a number, or a section whose"),
        ({"objective": {"alpha": {"schedule": "cosine", "start": 1}}}, "`objective.alpha.end` is missing"),
        ({"objective": {"alpha": "x"}}, "`objective.alpha`: input should be a valid number"),
        ({"objective": {"layers": [{"match": "angles", "pair": {1: 2}}]}}, "`objective.layers.0.pair`; did you mean `pairs`"),
    ],
    ids=str,
)  # fmt: skip
def test_a_message_names_the_key_as_the_recipe_has_it(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"cache": "c", **sections}, origin="recipe.yaml")
    assert said in str(caught.value)
