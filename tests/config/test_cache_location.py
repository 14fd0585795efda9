"""Location of a recipe's cache: a folder or a URL, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teachercache.config import LOCAL_COPIES, Recipe, parse_recipe
from teachercache.errors import RecipeError


def recipe(**sections: Any) -> Recipe:
    return parse_recipe(sections, origin="r")


def test_a_url_stays_as_it_is_written() -> None:
    url = "s3://bucket/caches/one?region=eu-central-1"
    made = recipe(cache=url)
    assert made.cache == url
    assert parse_recipe(made.model_dump(mode="json"), origin="r") == made


@pytest.mark.parametrize("folder", ["runs/cache", "/data/cache", "C:/cache", "a:b", "./s3:/x"])
def test_everything_else_is_a_folder(folder: str) -> None:
    made = recipe(cache=folder)
    assert made.cache == Path(folder)
    assert parse_recipe(made.model_dump(mode="json"), origin="r") == made


def test_credentials_have_no_place_in_a_url() -> None:
    with pytest.raises(RecipeError, match=r"`cache`: a URL must not hold credentials.*AWS_ACCESS_KEY_ID"):
        recipe(cache="s3://key:secret@bucket/cache")
    assert recipe(cache="gs://anonymous@bucket/a:b@c").cache == "gs://anonymous@bucket/a:b@c"


@pytest.mark.parametrize(
    ("given", "size"), [("50 GB", 50 * 10**9), ("1.5GiB", 3 * 2**29), (123456, 123456), ("200000", 200000)]
)
def test_sizes_have_units(given: Any, size: int) -> None:
    made = recipe(cache="c", stream={"local_bytes": given})
    assert made.stream.local_bytes == size and made.stream.local == LOCAL_COPIES
    assert parse_recipe(made.model_dump(mode="json"), origin="r") == made


@pytest.mark.parametrize("given", ["much", "5 parsecs", 0, -1])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(RecipeError, match=r"`stream.local_bytes`: "):
        recipe(cache="c", stream={"local_bytes": given})
