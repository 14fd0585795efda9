"""Held-out metrics against the teacher's and the student's full distributions, one row at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from teachercache.cache import Cache
from teachercache.models.loading import load_causal_lm
from teachercache.training.job.train import run_training

from builders import tiny_cache


def test_metrics_are_those_of_the_full_distributions(make_recipe: Any, tmp_path: Any) -> None:
    # k = the whole vocabulary: then head-and-tail KL is the full one.
    folder = tmp_path / "full"
    cache = Cache.open(tiny_cache(folder, targets={"logits": {"kind": "top-k", "k": 300, "dtype": "float32"}}))
    recipe = make_recipe(cache_folder=cache.folder, max_steps=1, learning_rate=1e-9, micro_batch=4)
    run_training(recipe)
    logged = [json.loads(line) for line in (recipe.train.output / "log.jsonl").read_text().splitlines()][-1]

    teacher, student = load_causal_lm(str(folder / "teacher")), load_causal_lm(recipe.student.model)
    ce = kl = correct = agreeing = positions = 0.0
    for index in range(cache.rows_of("held-out")):
        row = cache.read_row("held-out", index).row
        ids, mask = torch.tensor(row.input_ids_S[None]).long(), torch.tensor(row.target_mask_S)
        with torch.no_grad():
            p_NV, q_NV = (m(input_ids=ids).logits[0][mask].log_softmax(-1).double() for m in (teacher, student))
        labels_N = torch.tensor(row.labels_N()).long()
        ce -= float(q_NV.gather(1, labels_N[:, None]).sum())
        kl += float((p_NV.exp() * (p_NV - q_NV)).sum())
        correct += int((q_NV.argmax(-1) == labels_N).sum())
        agreeing += int((q_NV.argmax(-1) == p_NV.argmax(-1)).sum())
        positions += row.positions
    expected = {"loss": ce, "kl": kl, "accuracy": correct, "top1_agreement": agreeing}
    assert positions == cache.positions_of("held-out")
    for name, total in expected.items():
        assert logged[f"eval_{name}"] == pytest.approx(total / positions, rel=1e-4), name
    assert logged["eval_perplexity"] == pytest.approx(math.exp(ce / positions), rel=1e-3)


def test_a_cache_without_held_out_rows_trains_and_says_so(
    make_recipe: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_cache(tmp_path / "all", corpus={"held_out": 0.0})
    result = run_training(make_recipe(cache_folder=folder, max_steps=2))
    assert result["best"] is None
    assert load_causal_lm(result["student"]) is not None
    captured = capsys.readouterr()
    assert captured.err.count("no held-out rows") == 1
    assert captured.out == ""
