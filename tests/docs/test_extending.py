"""What the page on extending says works: its blocks run, and what they add is captured, trained from and refused as said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachercache import Cache, DistillationTrainer, ObjectiveConfig
from teachercache.cache.storage.store import LocalStore
from teachercache.config import parse_recipe
from teachercache.config.layer_losses import LAYER_LOSSES
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.objective.layers.terms import TERMS
from teachercache.targets import KINDS, TAIL_POLICIES
from teachercache.teacher import BACKENDS

from builders import build_cache, tiny_cache, tiny_recipe, tiny_teacher
from pages import ROOT, blocks
from target_kinds import walk_through_a_cache

PAGE = ROOT / "docs" / "design" / "extending.md"


@pytest.fixture(scope="module")
def added() -> Iterator[dict[str, Any]]:
    """Names that the page's blocks define, one after the other; afterwards nothing of them is on any list."""
    names: dict[str, Any] = {"__name__": "extension"}
    for block in blocks(PAGE, "python"):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    yield names
    added = ((KINDS, "rounded"), (TAIL_POLICIES, "by-id"), (LAYER_LOSSES, "norms"), (BACKENDS, "one-by-one"))
    for registry, name in added:
        registry.remove(name)
    del TERMS["norms"]


def test_a_kind_from_outside_is_captured_and_learned_from(added: dict[str, Any], tmp_path: Path) -> None:
    settings = {"kind": "rounded", "step": 0.01}
    cache, divergence = walk_through_a_cache(tmp_path, settings, temperature=3.0)
    assert type(cache.kind) is added["Rounded"] and cache.kind.settings() == settings
    exact = walk_through_a_cache(tmp_path / "full", {"kind": "full", "dtype": "float32"}, temperature=3.0)[1]
    torch.testing.assert_close(divergence, exact, rtol=1e-3, atol=0.0)
    KINDS.remove("rounded")
    with pytest.raises(CacheError, match="stores logits of kind 'rounded', this version reads top-k"):
        Cache.open(cache.name).kind  # noqa: B018
    KINDS.register(added["Rounded"])


def test_keys_of_parts_from_outside_are_checked_as_all_are(added: dict[str, Any]) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "unknown key `targets.logits.stepp`; did you mean `step`?": {"targets": {"logits": {"kind": "rounded", "stepp": 1}}},
        "`targets.logits.step`: input should be less than": {"targets": {"logits": {"kind": "rounded", "step": 2}}},
        "`objective.layers.0`: heads means nothing to norms": {"objective": {"layers": [{"match": "norms", "heads": "mix"}]}},
        "`objective.layers.0.power`: input should be greater": {"objective": {"layers": [{"match": "norms", "power": 0}]}},
        "did you mean `power`?": {"objective": {"layers": [{"match": "norms", "powr": 3}]}},
        "input should be 'auto', 'ghost'": {"objective": {"tail": "by-ids"}},
    }  # fmt: skip
    for message, sections in wrong.items():
        with pytest.raises(RecipeError) as caught:
            parse_recipe({"cache": "c", **sections}, origin="recipe.yaml")
        assert message in str(caught.value)


def test_a_tail_policy_from_outside_gives_each_token_its_share(added: dict[str, Any]) -> None:
    kind = KINDS["top-k"].from_settings({"k": 2, "temperatures": [1.0], "dtype": "float32"}, vocabulary_size=5)
    assert kind.tail_policies == ("ghost", "uniform", "renormalise", "by-id")
    arrays = {
        "head_ids": np.array([[1, 4]]),
        "head_logits": np.zeros((1, 2), np.float32),
        "tail_log_partition": np.zeros((1, 1), np.float32),  # as much mass as one token of the head
    }
    shares = np.array([1, 1 / 3, 1 / 4])  # of the ids 0, 2 and 3
    third = np.float64(1 / 3)
    expected = third * np.array([shares[0], 0, shares[1], shares[2], 0]) / shares.sum() + third * np.array(
        [0, 1, 0, 0, 1]
    )
    for given, xp in ((arrays, np), ({name: torch.from_numpy(values) for name, values in arrays.items()}, torch)):
        dense_NV = np.exp(np.asarray(kind.softened(given, 1.0, tail="by-id", xp=xp).dense()))
        np.testing.assert_allclose(dense_NV[0], expected, rtol=1e-5)


def test_a_student_learns_by_a_policy_and_a_loss_from_outside(added: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, TrainingArguments

    path = tiny_cache(tmp_path, targets={"logits": {"kind": "top-k", "k": 8}, "hidden": {"layers": [1, 2]}})
    config = {
        "alpha": 0.8,
        "tail": "by-id",
        "layers": [{"match": "norms", "power": 1.5, "pairs": {1: 2}, "centred": False}],
    }
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_teacher(tmp_path / "student", seed=5, layers=1)),
        cache=Cache.open(path),
        objective=ObjectiveConfig.model_validate(config),
        args=TrainingArguments(
            str(tmp_path / "run"), max_steps=12, learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True
        ),
    )
    trainer.train()
    norms = [entry["norms"] for entry in trainer.state.log_history if "norms" in entry]
    assert len(norms) == 12 and norms[-1] < norms[0]


def cache_by(backend: str, folder: Path, teacher: Path, **sections: Any) -> Cache:
    """A cache whose teacher ran by this backend, each row in a pass of its own."""
    small = {"positions_per_batch": 1, "threads_per_actor": 1}
    recipe = tiny_recipe(folder, teacher=teacher, precompute=small, **sections)
    assert recipe.teacher is not None
    named = recipe.teacher.model_copy(update={"backend": backend})
    return Cache.open(build_cache(recipe.model_copy(update={"teacher": named})))


@pytest.mark.parametrize("logits", [{"kind": "top-k", "k": 8}, {"kind": "head+sketch", "k": 6, "rank": 8}])
def test_a_backend_from_outside_captures_what_the_reference_does(
    added: dict[str, Any], tmp_path: Path, logits: dict[str, Any]
) -> None:
    """To the last bit."""
    teacher = tiny_teacher(tmp_path / "teacher")
    caches = [cache_by(name, tmp_path / name, teacher, targets={"logits": logits}) for name in BACKENDS]
    assert [cache.manifest.model["backend"] for cache in caches] == ["transformers", "one-by-one"]
    reference, other = (cache.manifest for cache in caches)
    assert reference.fingerprint == other.fingerprint
    assert reference.shards == other.shards  # by the sha256 of their files


def test_a_backend_says_what_it_cannot_store_and_one_that_nobody_has_is_refused(
    added: dict[str, Any], tmp_path: Path
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    with pytest.raises(ModelError, match="one-by-one shows no layers; leave out targets.hidden"):
        cache_by("one-by-one", tmp_path / "layers", teacher, targets={"hidden": {"layers": [1]}})
    with pytest.raises(
        RecipeError, match="teacher.backend is 'two-by-two'; there is transformers, one-by-one; install"
    ):
        cache_by("two-by-two", tmp_path / "nobody", teacher)


def test_a_store_from_outside_keeps_the_same_word(added: dict[str, Any], tmp_path: Path) -> None:
    for store in (added["MemoryStore"](), LocalStore(tmp_path)):
        assert store.put_if_absent("done/1", b"a") and not store.put_if_absent("done/1", b"b")
        store.put("done/2", b"c")
        assert (store.get("done/1"), store.list("done/")) == (b"a", ["done/1", "done/2"])
        store.delete("done/1")
        with pytest.raises(FileNotFoundError):
            store.get("done/1")
