"""Students learn from stored attention maps; what asks for more than maps is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError
from teachercache.models.loading import load_causal_lm
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.training.job.train import run_training
from teachercache.training.trainer.layers import layer_objectives, watched
from training.runs import log_of, losses_of

from builders import tiny_cache, tiny_model, tiny_teacher

LOGITS = {"kind": "top-k", "k": 16, "dtype": "float32"}
TERMS = [{"match": "attention-kl", "heads": "mix"}, {"match": "attention-mse", "weight": 0.5}]
STORED: dict[str, dict[str, Any]] = {
    "maps": {"kind": "maps"},
    "pooled": {"kind": "maps", "heads": 2},
    "top": {"kind": "maps", "top": 6},
    "queries-keys": {"kind": "queries-keys", "step": 0.005},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of one teacher, which is gone; the packed one has several segments in a row."""
    folder = tmp_path_factory.mktemp("maps")
    teacher = tiny_teacher(folder / "teacher", layers=4, hidden=48)
    made = {
        name: tiny_cache(
            folder / name, teacher=teacher, targets={"logits": LOGITS, "attention": {"layers": [2, 4], **settings}}
        )
        for name, settings in STORED.items()
    }
    targets = {"logits": LOGITS, "attention": {"layers": [2, 4], **STORED["maps"]}}
    made["packed"] = tiny_cache(
        folder / "packed", teacher=teacher, targets=targets, sequence={"length": 96, "layout": "packed"}
    )
    shutil.rmtree(teacher)
    return made


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pupil")
    tiny_model(layers=2, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def make(make_recipe: Any, caches: dict[str, Path], pupil: Path) -> Any:
    def made(name: str = "maps", **settings: Any) -> Any:
        terms = {"objective": {"layers": TERMS}, **settings}
        return make_recipe(cache_folder=caches[name], student_model=pupil, **terms)

    return made


def sums(cache: Cache, pupil: Path, rows: list[int], *, pack: bool = False) -> torch.Tensor:
    model = load_causal_lm(str(pupil))
    [objective] = layer_objectives(model, ObjectiveConfig.model_validate({"layers": TERMS}), [cache], seed=0)
    stored = [cache.read_row("train", index, columns=objective.columns) for index in rows]
    batch = Collator.of(OwnRows(cache, objective.columns), pack=pack)(stored)
    labels, layers, _ = batch.pop("shift_labels"), batch.pop("layers"), batch.pop("targets")
    with torch.no_grad(), watched(model, objective) as activations:
        model(**batch, use_cache=False)
        weights = dict.fromkeys(objective.names, 1.0)
        return torch.stack([*objective.loss(activations, layers, labels, weights=weights).terms.values()])


@pytest.mark.parametrize("name", ["maps", "pooled", "top", "packed"])
def test_a_row_that_is_packed_or_padded_has_the_terms_that_it_has_alone(
    caches: dict[str, Path], pupil: Path, name: str
) -> None:
    cache = Cache.open(caches[name])
    rows = [4, 1, 3, 0, 2][: cache.rows_of("train")]
    alone = torch.stack([sums(cache, pupil, [index]) for index in rows]).sum(0)
    torch.testing.assert_close(sums(cache, pupil, rows), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums(cache, pupil, rows, pack=True), alone, rtol=1e-4, atol=1e-4)
    assert not sums(cache, pupil, []).any()


def test_maps_give_the_terms_that_queries_and_keys_give(caches: dict[str, Path], pupil: Path, monkeypatch: Any) -> None:
    rows = list(range(8))
    maps, vectors = (sums(Cache.open(caches[name]), pupil, rows) for name in ("maps", "queries-keys"))
    torch.testing.assert_close(maps, vectors, rtol=3e-3, atol=1e-3)
    whole = [sums(Cache.open(caches[name]), pupil, rows) for name in ("maps", "top")]
    monkeypatch.setattr("teachercache.objective.layers.map_loss.CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr("teachercache.objective.layers.map_loss.FEWEST", 1)  # a query at a time
    for name, expected in zip(("maps", "top"), whole, strict=True):
        torch.testing.assert_close(sums(Cache.open(caches[name]), pupil, rows), expected)


@pytest.mark.parametrize("name", ["maps", "pooled", "top", "packed"])
def test_attention_comes_to_resemble_the_teachers(make: Any, name: str) -> None:
    recipe = make(name, epochs=8, evaluate_every=100, max_grad_norm=100.0)
    run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    first, last = (np.mean([record["attention-kl"] for record in part]) for part in (log[:4], log[-4:]))
    assert last < 0.9 * first


@pytest.mark.parametrize("settings", [{"pack": True}, {"loader_workers": 2}, {"zero_stage": 3}], ids=str)
def test_how_a_step_is_computed_does_not_change_its_loss(make: Any, tmp_path: Path, settings: Any) -> None:
    one, other = (
        make(output=tmp_path / name, max_steps=4, **given) for name, given in (("one", {}), ("other", settings))
    )
    run_training(one)
    run_training(other)
    np.testing.assert_allclose(losses_of(other.train.output), losses_of(one.train.output), rtol=1e-5)


@pytest.mark.parametrize("match", ["query-relations", "key-relations", "value-relations"])
def test_relations_among_vectors_are_refused_with_what_keeps_them(make: Any, match: str) -> None:
    recipe = make(objective={"layers": [{"match": match}]})
    message = (
        f"match {match}, but the cache keeps attention maps, .* precompute it with targets.attention.kind: relations"
    )
    with pytest.raises(CacheError, match=message) as caught:
        run_training(recipe)
    assert "\n" not in str(caught.value)
