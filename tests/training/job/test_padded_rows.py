"""Rows of an output layer that no token has: training takes their mass away, and nobody samples them from an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teachercache.cache import Cache
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.training.job.train import run_training

from builders import tiny_model

PADDING = 40


def padding_share(model: Any, cache: Path) -> float:
    """The mean share of what is no token, over the positions of a row."""
    row = Cache.open(cache).read_row("held-out", 0).row
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(row.input_ids_S.astype("int64"))[None]).logits[0]
    return float(logits.softmax(-1)[:, 300:].sum(-1).mean())


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    model = tiny_model(vocabulary=300 + PADDING, layers=1, seed=3)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.div_(6)  # as transformers begins: every row as likely as any other
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_no_token_loses_its_mass_and_is_never_sampled(
    make_recipe: Any, cache: Path, padded: Path, stage: int
) -> None:
    objective = {"alpha": 1.0, "temperature": 1.0}
    result = run_training(
        make_recipe(student_model=padded, objective=objective, zero_stage=stage, epochs=5, evaluate_every=99)
    )
    before, student = load_causal_lm(str(padded)), load_causal_lm(result["student"])
    assert padding_share(student, cache) < 0.5 * padding_share(before, cache)
    begin = torch.arange(64)[:, None]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "top_k": 0, "eos_token_id": None}
    assert int(student.generate(begin, **settings).max()) < len(load_tokenizer(result["student"])) == 300
    assert int(student.generate(begin, **settings, suppress_tokens=None).max()) >= 300  # some is left after a few steps


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon", "total-variation"])
def test_every_divergence_takes_it_away(make_recipe: Any, cache: Path, padded: Path, divergence: str) -> None:
    objective = {"alpha": 1.0, "temperature": 1.0, "divergence": divergence}
    result = run_training(make_recipe(student_model=padded, objective=objective, epochs=5, evaluate_every=99))
    share = padding_share(load_causal_lm(result["student"]), cache)
    assert share < 0.7 * padding_share(load_causal_lm(str(padded)), cache)
