"""The fidelity command: figures against what is known of a cache, and its refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from teachercache.cache import Cache
from teachercache.cli import main
from teachercache.errors import CacheError, ModelError, UserError
from teachercache.evaluation.fidelity import (
    Comparison,
    angle_degrees,
    calibration_error,
    parse_options,
    run_fidelity,
    weakened_last_block,
)
from teachercache.models.loading import load_causal_lm
from teachercache.tables import fidelity_table
from teachercache.targets import Softened
from teachercache.targets.logits.softened import UniformTail

from builders import sentences, tiny_cache, tiny_model, tiny_teacher

FULL = {"kind": "full", "dtype": "float32"}
SKETCH = {"kind": "head+sketch", "k": 6, "rank": 32, "calibration_positions": 800}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("fidelity") / "teacher")


def made(folder: Path, teacher: Path, logits: dict[str, Any]) -> Cache:
    texts = sentences(80, seed=4)
    return Cache.open(tiny_cache(folder, teacher=teacher, texts=texts, targets={"logits": logits}))


def figures(cache: Cache, teacher: Path, **options: Any) -> dict[str, dict[str, float]]:
    return run_fidelity(cache, teacher=str(teacher), rows=6, **options)["temperatures"]


def test_a_finer_sketch_is_nearer_and_a_fine_one_is_exact(tmp_path: Path, teacher: Path) -> None:
    fine = figures(made(tmp_path / "fine", teacher, {**SKETCH, "step": 0.01}), teacher)
    coarse = figures(made(tmp_path / "coarse", teacher, {**SKETCH, "step": 0.5}), teacher)
    for temperature in ("1", "2", "4"):
        assert 0 <= fine[temperature]["kl"] < 2e-3
        assert fine[temperature]["gradient_angle_degrees"] < 1.5
        assert fine[temperature]["gradient_cosine_p05"] > 0.99
        assert coarse[temperature]["kl"] > 3 * fine[temperature]["kl"]


def test_the_calibration_error_is_that_of_the_distribution_which_is_a_forecast(tmp_path: Path, teacher: Path) -> None:
    """A softened one is none: it has no such figure, in JSON or in the table."""
    cache = made(tmp_path, teacher, {"kind": "top-k", "k": 8, "temperatures": [1, 2]})
    result = run_fidelity(cache, teacher=str(teacher), rows=6, temperatures=(1.0, 2.0))
    assert [T for T, figures in result["temperatures"].items() if "ece" in figures] == ["1"]
    table = fidelity_table(result)
    ece = f"{result['temperatures']['1']['ece']:.4f}"
    assert list(table.columns[-1].cells) == [ece] + ["–"] * (len(result["temperatures"]) - 1)


def test_the_usual_top_k_points_elsewhere_at_higher_temperatures(tmp_path: Path, teacher: Path) -> None:
    cache = made(tmp_path, teacher, {"kind": "top-k", "k": 8, "temperatures": [1, 4]})
    found = figures(cache, teacher, temperatures=(1.0, 4.0), tail="renormalise")
    spread = figures(cache, teacher, temperatures=(1.0, 4.0), tail="uniform")
    for temperature in ("1", "4"):  # the tiny teacher is nearly uniform: a uniform tail is little better by angle
        assert found[temperature]["gradient_angle_degrees"] > spread[temperature]["gradient_angle_degrees"] + 3
        assert found[temperature]["kl"] > 10 * spread[temperature]["kl"]


def test_rows_that_calibration_saw_are_never_measured(tmp_path: Path, teacher: Path) -> None:
    cache = made(tmp_path, teacher, {**SKETCH, "step": 0.2})
    seen = set(cache.manifest.calibration["sources"])
    places = [(split, index) for split in ("train", "held-out") for index in range(cache.rows_of(split))]
    rows = [cache.read_row(*place).row for place in places]
    fresh = [row for row in rows if not seen & {segment.source_id for segment in row.segments}]
    assert run_fidelity(cache, teacher=str(teacher), rows=10**6)["rows"] == len(fresh) < len(rows)
    cache.manifest.calibration["sources"] = [segment.source_id for row in rows for segment in row.segments]
    with pytest.raises(CacheError, match="none is left to measure it on"):
        run_fidelity(cache, teacher=str(teacher))


def test_the_command_prints_one_document(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = made(tmp_path, teacher, {**SKETCH, "step": 0.2})
    with pytest.raises(SystemExit) as end:
        main(
            ["fidelity", str(cache.folder), "--teacher", str(teacher), "--rows", "2", "--temperatures", "1,3", "--json"]
        )
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["temperatures"]) == {"1", "3"} and printed["tail"] == "sketch"
    assert printed["basis_bytes"] > 0 and printed["positions"] > 0


def test_a_receiver_draws_rows_and_accepts_or_does_not(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = made(tmp_path, teacher, {"kind": "top-k", "k": 8, "temperatures": [1, 2]})
    command = [
        "fidelity",
        str(cache.folder),
        "--teacher",
        str(teacher),
        "--rows",
        "3",
        "--temperatures",
        "1,2",
        "--json",
    ]

    def answer(*options: str) -> tuple[Any, dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            main([*command, *options])
        return end.value.code, json.loads(capsys.readouterr().out)

    _, plain = answer()
    largest = max(figures["kl"] for figures in plain["temperatures"].values())
    assert answer("--at-most", str(largest))[0] == 0
    status, refused = answer("--at-most", str(largest * 0.999))
    assert status == 1 and refused["ok"] is False and refused["temperatures"] == plain["temperatures"]
    assert "not accepted" in str(fidelity_table(refused).caption)
    drawn = {str(answer("--seed", str(seed))[1]["temperatures"]) for seed in range(4)}
    assert len(drawn) > 1 and answer("--seed", "0")[1]["temperatures"] == plain["temperatures"]


def test_another_teacher_is_refused_unless_it_is_wanted(tmp_path: Path, teacher: Path) -> None:
    cache = made(tmp_path / "made", teacher, FULL)
    other = tiny_teacher(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"not those of this cache's teacher.*--other-weights"):
        run_fidelity(cache, teacher=str(other), rows=1)
    assert run_fidelity(cache, teacher=str(other), rows=1, other_weights=True)["temperatures"]["1"]["kl"] > 0.01
    assert run_fidelity(cache, teacher=str(teacher), rows=1)["temperatures"]["1"]["kl"] < 1e-6
    with pytest.raises(ModelError, match=r"files that are not here; say where: --teacher PATH"):
        run_fidelity(cache, rows=1)


def test_a_half_precision_teacher_is_compared_with_what_was_stored_of_it(tmp_path: Path, teacher: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(teacher, half)
    load_causal_lm(str(teacher)).bfloat16().save_pretrained(half)
    found = figures(made(tmp_path / "made", half, FULL), half)["1"]
    # Its own logits, rounded to 8 bits, lie 1e-6 nats and 0.04 degrees away.
    assert found["kl"] < 5e-7 and found["gradient_angle_degrees"] < 0.02


def test_options_that_make_no_sense_are_refused() -> None:
    for text in ("nan", "1,inf"):
        with pytest.raises(UserError, match="no list of numbers"):
            parse_options(text, None)
    with pytest.raises(UserError, match="write e.g. 1,2,4"):
        parse_options("one", None)
    with pytest.raises(UserError, match="use uniform, renormalise, sketch"):
        parse_options("1", "ghost")


def test_the_student_is_the_teacher_without_its_last_block() -> None:
    model, ids = tiny_model(vocabulary=300), torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states[-2]
        expected = model.lm_head(model.model.norm(expected))
        with weakened_last_block(model):
            cut = model(ids).logits
        with weakened_last_block(model, share=1.0):
            whole = model(ids).logits
        torch.testing.assert_close(whole, model(ids).logits)
    torch.testing.assert_close(cut, expected)
    assert not torch.allclose(cut, whole)


@pytest.mark.parametrize("positions", [1, 127, 128, 200])
def test_the_first_positions_of_a_row_are_compared_with_their_own(positions: int) -> None:
    logits, width = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)), 4
    log_prob, ids = torch.log_softmax(logits, -1).topk(29)
    tail = torch.log1p(-log_prob.exp().sum(-1))
    stored = Softened(ids, log_prob, tail, UniformTail(30, log_prob))  # exact: one token outside the head
    comparison = Comparison([1.0])
    comparison.add(
        lambda _: stored,
        logits[:positions],
        torch.zeros(positions, 30),
        torch.ones(positions, width),
        ids[:positions, 0],
    )
    figures = comparison.result()["1"]
    assert comparison.positions == positions
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["gradient_angle_degrees"] < 0.1


def test_angles_and_calibration_errors_are_what_they_say() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.tan(math.radians(0.001))])
    assert angle_degrees(x, 3 * y) == pytest.approx(0.001, rel=1e-3)
    assert angle_degrees(x, torch.tensor([0.0, 2.0])) == pytest.approx(90)
    confidence = torch.tensor([0.9] * 10 + [0.5] * 10)
    correct = torch.tensor([True] * 9 + [False] + [True] * 10)
    assert calibration_error(confidence, correct) == pytest.approx(0.25, abs=1e-6)
