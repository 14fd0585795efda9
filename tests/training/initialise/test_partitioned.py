"""ZeRO 3: a student that is loaded in parts learns what one learns that was whole before DeepSpeed cut it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import Recipe
from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import train_order
from teachercache.training.initialise.lora import with_adapters
from teachercache.training.initialise.partitioned import is_partitioned, rows_of, runnable
from teachercache.training.job.arguments import training_arguments
from teachercache.training.job.launch import Process, training_process
from teachercache.training.job.train import run_training
from teachercache.training.trainer.trainer import DistillationTrainer
from training.runs import CLOCKED, log_of

from builders import sentences, tiny_cache, tiny_model, tiny_student, tiny_teacher

LAYERS = [{"match": "hidden-cosine"}, {"match": "attention-kl", "heads": "mix"}]
TARGETS = {
    "logits": {"kind": "top-k", "k": 16, "dtype": "float32"},
    "hidden": {"layers": [2], "step": 0.02},
    "attention": {"layers": [2], "values": True},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, with layers: everything that runs a student before it is trained."""
    folder = tmp_path_factory.mktemp("packed")
    teacher = tiny_teacher(folder / "teacher", hidden=48)
    return tiny_cache(folder, teacher=teacher, texts=sentences(40), targets=TARGETS, sequence={"layout": "packed"})


def whole(recipe: Recipe) -> list[dict[str, Any]]:
    """The log of a run whose student was loaded before there was a configuration to load it by."""
    assert recipe.student is not None and recipe.train is not None
    with training_process() as process:
        model = load_causal_lm(recipe.student.model)
        assert not is_partitioned(model)
        if recipe.student.lora is not None:
            model = with_adapters(model, recipe.student.lora, seed=recipe.train.seed)
        plan, args = plan_and_arguments(recipe, process)
        cache = Cache.open(recipe.cache)
        trainer = DistillationTrainer(model=model, cache=cache, args=args, objective=recipe.objective, plan=plan)
        trainer.train()
        return trainer.state.log_history


def plan_and_arguments(recipe: Recipe, process: Process) -> tuple[BatchPlan, TrainingArguments]:
    """As the command makes them of a recipe with `max_steps`."""
    config, cache = recipe.train, Cache.open(recipe.cache)
    assert config is not None and config.max_steps is not None
    order = train_order(cache, seed=config.seed, window=recipe.stream.window)
    plan = BatchPlan(order, config.global_batch, config.micro_batch, process.world_size)
    evaluates = bool(cache.rows_of("held-out"))
    return plan, training_arguments(
        config, plan=plan, steps=config.max_steps, evaluates=evaluates, on_gpu=process.on_gpu
    )


def figures(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in log]


CASES: dict[str, dict[str, Any]] = {
    "fp32": {"objective": {"layers": LAYERS}},
    "bf16": {"objective": {"layers": LAYERS}, "precision": "bf16"},
    "lora": {"lora": {"rank": 4}},
    "lora, bf16": {"lora": {"rank": 4}, "precision": "bf16"},
    "untied": {"untied": True},
}
SLOW = {"lora", "lora, bf16", "untied"}


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in CASES]
)
def test_a_student_in_parts_learns_what_a_whole_one_learns(
    make_recipe: Any, packed: Path, tmp_path: Path, case: str
) -> None:
    """Every figure of every step, to the last bit, and the student that is exported."""
    settings = dict(CASES[case])
    if settings.pop("untied", False):
        student = tiny_teacher(tmp_path / "student", seed=5, layers=1, tied=False)
    else:
        student = tiny_student(tmp_path / "student", layers=2)
    made = [
        make_recipe(cache_folder=packed, student_model=student, zero_stage=3, max_steps=4, output=tmp_path / name, **settings)
        for name in ("parts", "whole")
    ]  # fmt: skip
    run_training(made[0])
    expected = figures(whole(made[1]))
    found = log_of(tmp_path / "parts")
    assert len(found) >= 4 and found == [record for record in expected if "loss" in record or "eval_loss" in record]
    weights = [load_file(tmp_path / name / "checkpoint-4" / _weights(settings)) for name in ("parts", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _weights(settings: dict[str, Any]) -> str:
    return "adapter_model.safetensors" if "lora" in settings else "model.safetensors"


def test_it_can_be_asked_and_run_before_deepspeed_does(make_recipe: Any, packed: Path, tmp_path: Path) -> None:
    """Its logits are those of the whole student, block by block, and nothing stays gathered; also where it fails."""
    student = tiny_student(tmp_path / "student", layers=2)
    ids_BS = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_causal_lm(str(student))(input_ids=ids_BS).logits
    with training_process() as process:
        recipe = make_recipe(cache_folder=packed, student_model=student, zero_stage=3, max_steps=1)
        _, args = plan_and_arguments(recipe, process)
        model = load_causal_lm(str(student))
        assert args.deepspeed and all(weight.numel() == 0 for weight in model.parameters())
        assert rows_of(model.get_input_embeddings().weight) == 300
        with torch.no_grad(), runnable(model):
            assert torch.equal(model(input_ids=ids_BS).logits, expected)
            with pytest.raises(IndexError):
                model(input_ids=ids_BS + 300)
        assert all(weight.numel() == 0 for weight in model.parameters())
        hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
        assert not hooks


def test_a_student_that_does_not_fit_is_refused_in_parts_too(make_recipe: Any, packed: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny_model(vocabulary=280).save_pretrained(small)
    with pytest.raises(ModelError, match="its input embedding has 280 tokens"):
        run_training(make_recipe(cache_folder=packed, student_model=small, zero_stage=3))
