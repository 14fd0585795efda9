"""Packed rows under flash kernels: all rows of a batch in one, so that documents do not see each other; teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from flash import flash_kernels, with_flash
from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig, parse_recipe
from teachercache.errors import ModelError, RecipeError
from teachercache.evaluation.quality import held_out_rows, quality
from teachercache.evaluation.recipe import student_specs
from teachercache.models.loading import model_inputs
from teachercache.models.probes import isolates_packed_segments
from teachercache.targets import HiddenStates, StoredTargets, TopK
from teachercache.teacher import Teacher
from teachercache.tokens.rows import Segment, TokenRow
from teachercache.training.job.train import run_training
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import tiny_cache, tiny_model, tiny_student
from tiny_models import model_of

VOCABULARY = 300
ARCHITECTURES = ("llama", "gemma2", "qwen3", "qwen2")


def row(seed: int, *lengths: int) -> TokenRow:
    ids_S = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    mask_S = np.ones(len(ids_S), dtype=bool)
    mask_S[np.cumsum(lengths) - 1] = False
    return TokenRow(f"{seed:032x}", False, ids_S, mask_S, tuple(Segment(f"{seed:032x}", 0, 0, 0, at) for at in starts))


ROWS = [row(1, 10, 14, 3), row(2, 8, 20), row(3, 31), row(4, 2, 2, 5)]  # of unequal lengths: some would be padded


def teacher_of(model: Any) -> Teacher:
    targets = StoredTargets(
        TopK(8, (1.0,), "float32", VOCABULARY), hidden=HiddenStates(layers=(0, 2), width=32, blocks=3, codec="bf16")
    )
    return Teacher.of(model, targets=targets, layout="packed", pad_id=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_has_the_targets_that_it_has_alone(architecture: str) -> None:
    model = with_flash(model_of(architecture))
    with flash_kernels() as calls:
        teacher = teacher_of(model)
        together = teacher.capture(ROWS, positions_per_batch=10_000)
        assert calls["varlen"]
        apart = [captured for each in ROWS for captured in teacher.capture([each], positions_per_batch=10_000)]
    plain = teacher_of(model_of(architecture, attention="eager")).capture(ROWS, positions_per_batch=10_000)
    for one, other, expected in zip(together, apart, plain, strict=True):
        assert one.columns is not None and other.columns is not None and expected.columns is not None
        for name, values in one.columns.items():
            np.testing.assert_array_equal(values, other.columns[name])
            if name == "actual_log_prob":
                np.testing.assert_allclose(values, expected.columns[name], atol=1e-4)


def test_rows_in_a_batch_of_several_would_see_each_other() -> None:
    """The way of transformers, and the reason why rows are put into one: if this changes, they need not be."""
    model = with_flash(model_of("llama"))
    inputs = {name: torch.from_numpy(array) for name, array in model_inputs(ROWS, pad_id=0, layout="packed").items()}
    with flash_kernels(), torch.no_grad():
        leaking = model(**inputs, use_cache=False).logits[0, 10:24]
        alone = model(input_ids=torch.from_numpy(ROWS[0].input_ids_S[10:24]).long()[None], use_cache=False).logits[0]
        assert (leaking - alone).abs().max() > 0.1 * alone.std()
        assert isolates_packed_segments(model, vocabulary_size=VOCABULARY)


def test_a_model_that_keeps_positions_from_its_kernel_is_refused() -> None:
    """Its attention is told of no positions, so that the kernel sees one document where there are several."""
    model = with_flash(model_of("llama"))
    for block in model.model.layers:
        attention = block.self_attn
        block.self_attn.forward = lambda *args, _of=attention.forward, position_ids=None, **kwargs: _of(*args, **kwargs)
    with flash_kernels(), pytest.raises(ModelError, match="does not keep the segments of a packed row apart"):
        teacher_of(model)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("packed"), sequence={"layout": "packed", "length": 96})


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("documents"))


def losses(cache: Path, model: Any, run: Path, *, pack: bool) -> list[float]:
    """Losses of some steps, and of the held-out rows behind them."""
    args = TrainingArguments(
        str(run), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=3e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=model, cache=Cache.open(cache), args=args, objective=ObjectiveConfig(), pack=pack
    )
    trainer.train()
    found = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return [*found, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("pack", [False, True])
def test_a_student_learns_what_it_learns_by_another_kernel(
    packed: Path, documents: Path, tmp_path: Path, pack: bool
) -> None:
    """From a packed cache, and from documents that training packs."""
    cache = documents if pack else packed
    with flash_kernels() as calls:
        found = losses(cache, with_flash(tiny_model(seed=1)), tmp_path / "flash", pack=pack)
    assert calls["varlen"]
    assert found == pytest.approx(losses(cache, tiny_model(seed=1), tmp_path / "sdpa", pack=pack), abs=1e-5)


def test_a_student_whose_documents_see_each_other_is_refused_at_the_first_batch(packed: Path, tmp_path: Path) -> None:
    """A flash kernel runs on a GPU alone, where training brings the student: nothing can be tried before."""
    model = with_flash(tiny_model(seed=1))
    for block in model.model.layers:
        attention = block.self_attn
        block.self_attn.forward = lambda *args, _of=attention.forward, position_ids=None, **kwargs: _of(*args, **kwargs)
    with flash_kernels(), pytest.raises(ModelError, match="see each other"):
        losses(packed, model, tmp_path, pack=False)


def test_it_is_measured_as_by_another_kernel(packed: Path) -> None:
    cache = Cache.open(packed)
    rows = held_out_rows(cache, limit=None)
    expected = quality(tiny_model(seed=1), rows, cache, batch_rows=4)
    with flash_kernels() as calls:
        found = quality(with_flash(tiny_model(seed=1)), rows, cache, batch_rows=4)
    assert calls["varlen"] and found == pytest.approx(expected, abs=1e-5)


def test_a_recipe_chooses_the_students_attention(documents: Path, tmp_path: Path) -> None:
    recipe = {
        "cache": str(documents),
        "student": {"model": str(tiny_student(tmp_path / "student")), "attention": "nonesuch"},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "trackers": [], "loader_workers": 0},
    }
    with pytest.raises(ModelError, match="nonesuch"):
        run_training(parse_recipe(recipe, origin="tests"))
    recipe["student"]["attention"] = "eager"
    parsed = parse_recipe(recipe, origin="tests")
    assert run_training(parsed)["steps"] == 1
    specs = student_specs(parsed.student, tmp_path / "run" / "student")
    assert [spec.attention for spec in specs] == ["eager", "eager"]


def test_flash_kernels_want_half_precision() -> None:
    train = {"output": "run", "precision": "fp32"}
    student = {"model": "s", "attention": "flash_attention_2"}
    with pytest.raises(RecipeError, match="computes in half precision alone; set train.precision: bf16"):
        parse_recipe({"cache": "c", "student": student, "train": train}, origin="tests")
    assert parse_recipe({"cache": "c", "student": student, "train": {**train, "precision": "bf16"}}, origin="tests")
    teacher = {"model": "t", "attention": "flash_attention_3", "dtype": "float32"}
    with pytest.raises(RecipeError, match="teacher.dtype: bfloat16"):
        parse_recipe({"cache": "c", "teacher": teacher}, origin="tests")
