"""Files that training takes from a cache beside its rows: listed files alone, and the tokenizer that the manifest means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.forgery import sign
from teachercache.cache import Cache
from teachercache.errors import CacheDamaged
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.fingerprint import saved_fingerprint, tokenizer_fingerprint
from teachercache.training.job.train import run_training

from builders import aligned, other_student


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copied"))


def _swap_two_ids(tokenizer: Path) -> None:
    data = json.loads(tokenizer.read_text())
    vocabulary = data["model"]["vocab"]
    one, other = [token for token in vocabulary if token.startswith("Ġ")][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(data))


def test_only_listed_files_are_exported(make_recipe: Any, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (copied / "teacher" / "tokenizer_evil").symlink_to(tmp_path / "private")
    (copied / "teacher" / "vocab_evil").write_text("not listed")
    (copied / "teacher" / "additional_chat_templates").mkdir()
    (copied / "teacher" / "additional_chat_templates" / "evil.jinja").write_text("not listed")
    recipe = make_recipe(cache_folder=copied, max_steps=1)
    run_training(recipe)
    exported = {path.name for path in recipe.train.output.joinpath("student").rglob("*")}
    assert "tokenizer.json" in exported
    assert not [name for name in exported if "evil" in name or "additional" in name]


@pytest.mark.parametrize("signed", [False, True])
def test_two_swapped_ids_of_the_tokenizer_are_refused_before_a_step(
    make_recipe: Any, copied: Path, signed: bool
) -> None:
    """Also when somebody gave the changed file its digest."""
    _swap_two_ids(copied / "teacher" / "tokenizer.json")
    if signed:
        sign(copied)
    recipe = make_recipe(cache_folder=copied)
    reason = (
        "give another tokenizer than the manifest says" if signed else "tokenizer.json (differs from its sha256|holds)"
    )
    with pytest.raises(CacheDamaged, match=reason) as caught:
        run_training(recipe)
    assert "\n" not in str(caught.value)
    assert not [*recipe.train.output.glob("checkpoint-*")] and not (recipe.train.output / "student").exists()
    with pytest.raises(CacheDamaged, match=reason):
        teacher_tokenizer(Cache.open(copied))


def test_a_tokenizer_that_the_library_describes_otherwise_is_known_by_its_files(copied: Path) -> None:
    """As a later version of the library may: here it drops a member that it does not know."""
    file = copied / "teacher" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["pre_tokenizer"]["of another version"] = 1
    file.write_text(json.dumps(data))
    said = saved_fingerprint(file.parent)
    sign(copied, lambda manifest: manifest["settings"]["tokenizer"].update(fingerprint=said))
    assert tokenizer_fingerprint(teacher_tokenizer(Cache.open(copied))) != said


def test_alignment_refuses_a_changed_tokenizer(copied: Path, tmp_path: Path) -> None:
    _swap_two_ids(copied / "teacher" / "tokenizer.json")
    with pytest.raises(CacheDamaged, match=r"tokenizer.json (differs from its sha256|holds)"):
        aligned(copied, other_student(tmp_path / "other"))


def test_a_changed_tokenizer_of_an_alignment_is_refused(make_recipe: Any, copied: Path, tmp_path: Path) -> None:
    student = other_student(tmp_path / "other")
    folder = aligned(copied, student)
    _swap_two_ids(folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(CacheDamaged, match=r"tokenizer.json (differs from its sha256|holds)"):
        run_training(make_recipe(cache_folder=copied, student_model=student))
