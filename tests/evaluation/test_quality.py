"""Scores on held-out positions against a naive pass over single, unpadded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from teachercache.cache import Cache
from teachercache.errors import CacheError, JobFailed, ModelError
from teachercache.evaluation.quality import held_out_rows, quality
from teachercache.models.loading import load_causal_lm

from builders import build_cache, sentences, tiny_cache, tiny_model, tiny_recipe, tiny_teacher

LAYOUTS = ("documents", "packed")


@pytest.fixture(scope="module", params=LAYOUTS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Rows of many lengths, from a teacher whose vocabulary is padded by 20."""
    folder = tmp_path_factory.mktemp(request.param)
    teacher = tiny_teacher(folder / "teacher", padded_vocabulary=20)
    return Cache.open(tiny_cache(folder, teacher=teacher, sequence={"length": 48, "layout": request.param}))


def _student(cache: Cache, *, padding: int = 0, seed: int = 5) -> Any:
    return tiny_model(vocabulary=cache.manifest.vocabulary_size + padding, seed=seed)


def without_padding(model: Any, cache: Cache) -> Any:
    """A model that has learned never to choose what is no token; its rows are random in a tiny one."""
    with torch.no_grad():
        model.get_output_embeddings().weight[cache.manifest.vocabulary_size :] = 0
    return model


def _naive(model: Any, cache: Cache) -> dict[str, float]:
    """One row at a time, one segment at a time, nothing padded."""
    loss = correct = agreeing = positions = 0.0
    for index in range(cache.rows_of("held-out")):
        stored = cache.read_row("held-out", index)
        row, teacher_N = stored.row, torch.from_numpy(stored.targets["head_ids"][:, 0].astype("int64"))
        starts = [segment.start for segment in row.segments]
        parts = zip(starts, [*starts[1:], row.length], strict=True)
        with torch.no_grad():
            logits = [model(torch.from_numpy(row.input_ids_S[a:b].astype("int64"))[None]).logits[0] for a, b in parts]
        logits_NV = torch.cat(logits)[torch.from_numpy(row.target_mask_S)]
        labels_N = torch.from_numpy(row.labels_N().astype("int64"))
        loss += float(F.cross_entropy(logits_NV, labels_N, reduction="sum"))
        correct += int((logits_NV.argmax(-1) == labels_N).sum())
        agreeing += int((logits_NV.argmax(-1) == teacher_N).sum())
        positions += len(labels_N)
    return {"loss": loss / positions, "accuracy": correct / positions, "top1_agreement": agreeing / positions}


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_scores_equal_those_of_single_unpadded_rows(cache: Cache, padding: int, batch_rows: int) -> None:
    """Mistakes 9 and 10 of the field: padding changes nothing and is never scored."""
    model = _student(cache, padding=padding)
    measured = quality(model, held_out_rows(cache, limit=None), cache, batch_rows=batch_rows)
    expected = _naive(model, cache)
    assert measured["positions"] == cache.positions_of("held-out")
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert measured["perplexity"] == pytest.approx(torch.tensor(expected["loss"]).exp().item(), rel=1e-4)
    for name in ("accuracy", "top1_agreement"):
        assert measured[name] == pytest.approx(expected[name], abs=1e-9)


def test_the_teacher_agrees_with_its_own_cache(cache: Cache) -> None:
    teacher = without_padding(load_causal_lm(str(cache.folder.parent / "teacher")), cache)
    measured = quality(teacher, held_out_rows(cache, limit=None), cache, batch_rows=4)
    assert measured["top1_agreement"] == 1.0
    assert (
        measured["top1_agreement"]
        > quality(_student(cache), held_out_rows(cache, limit=None), cache, batch_rows=4)["top1_agreement"]
    )


def test_a_limit_spreads_over_the_split(cache: Cache) -> None:
    every = [stored.row.row_id for stored in held_out_rows(cache, limit=None)]
    some = [stored.row.row_id for stored in held_out_rows(cache, limit=3)]
    assert len(every) == cache.rows_of("held-out") and len(some) == min(3, len(every))
    assert (some[0], some[-1]) == (every[0], every[-1])
    assert len(held_out_rows(cache, limit=10**6)) == len(every)


def test_a_model_with_too_few_tokens_is_refused(cache: Cache) -> None:
    embedding = tiny_model(vocabulary=cache.manifest.vocabulary_size)
    embedding.lm_head = torch.nn.Linear(32, cache.manifest.vocabulary_size - 1)
    with pytest.raises(ModelError, match="the tokenizer of its rows has"):
        quality(embedding, held_out_rows(cache, limit=None), cache, batch_rows=4)


def test_broken_weights_are_no_score(cache: Cache) -> None:
    model = _student(cache)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(JobFailed, match="nan"):
        quality(model, held_out_rows(cache, limit=None), cache, batch_rows=4)


def test_a_cache_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    path = tiny_cache(tmp_path, texts=sentences(4), corpus={"held_out": 0.0})
    with pytest.raises(CacheError, match=r"no held-out rows .* corpus\.held_out"):
        held_out_rows(Cache.open(path), limit=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_teacher_is_not_scored_by_rounded_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_teacher(tmp_path / "teacher", padded_vocabulary=20)
    name = str(dtype).removeprefix("torch.")
    recipe = tiny_recipe(tmp_path, teacher=folder, texts=sentences(200))
    assert recipe.teacher is not None
    teacher = recipe.teacher.model_copy(update={"dtype": name})
    cache = Cache.open(build_cache(recipe.model_copy(update={"teacher": teacher})))
    model = without_padding(load_causal_lm(str(folder), dtype=name), cache)
    rows = held_out_rows(cache, limit=None)
    measured = quality(model, rows, cache, batch_rows=1)
    own = _naive(model.to(dtype), cache)
    assert measured["top1_agreement"] > 0.995
    assert measured["loss"] == pytest.approx(own["loss"], rel=2e-3)
    if dtype == torch.bfloat16:
        assert own["top1_agreement"] < measured["top1_agreement"]
