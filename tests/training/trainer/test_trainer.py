"""`DistillationTrainer` as a library, without a recipe and without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.training.job.train import run_training
from teachercache.training.supervision.choice import supervision_of
from teachercache.training.trainer.trainer import DistillationTrainer
from training.runs import CLOCKED, losses_of

from builders import tiny_cache, tiny_model


def _trainer(cache: Path, student: Path, output: Path, **settings: Any) -> DistillationTrainer:
    arguments: dict[str, Any] = {
        "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1,
        "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_grad_norm": 0.3, "seed": 0, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch",
    }  # fmt: skip
    return DistillationTrainer(
        model=load_causal_lm(str(student)),
        cache=Cache.open(cache),
        args=TrainingArguments(output_dir=str(output), **{**arguments, **settings}),
        objective=ObjectiveConfig(alpha=0.7, temperature=2.0),
    )


@pytest.mark.parametrize("of", ["caches", "objective"])
def test_supervision_of_another_run_is_refused(cache: Path, student: Path, tmp_path: Path, of: str) -> None:
    opened, objective = Cache.open(cache), ObjectiveConfig(alpha=0.7)
    other = supervision_of([opened] * 2, objective) if of == "caches" else supervision_of([opened], ObjectiveConfig())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = load_causal_lm(str(student))
    with pytest.raises(RecipeError, match=f"supervision is of (other|another) {of}"):
        DistillationTrainer(model=model, cache=opened, args=args, objective=objective, supervision=other)


def test_it_trains_by_arguments_alone(cache: Path, student: Path, make_recipe: Any, tmp_path: Path) -> None:
    trainer = _trainer(cache, student, tmp_path / "library")
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    recipe = make_recipe(epochs=1, warmup_fraction=0.0, zero_stage=2)
    run_training(recipe)
    assert losses == pytest.approx(losses_of(recipe.train.output), abs=1e-5)
    assert trainer.state.epoch == 1.0


def test_it_resumes_from_the_newest_whole_checkpoint(cache: Path, student: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = _trainer(cache, student, tmp_path / "run", **settings)
    whole.train()
    (tmp_path / "run" / "checkpoint-6" / "complete.json").unlink()
    again = _trainer(cache, student, tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    history = [[r for r in t.state.log_history if "loss" in r] for t in (whole, again)]
    for ours, theirs in zip(*history, strict=True):
        assert {**ours, **dict.fromkeys(CLOCKED)} == {**theirs, **dict.fromkeys(CLOCKED)}


def test_it_evaluates_by_itself(cache: Path, student: Path, tmp_path: Path) -> None:
    metrics = _trainer(cache, student, tmp_path).evaluate()
    assert set(metrics) >= {f"eval_{name}" for name in ("loss", "perplexity", "kl", "accuracy", "top1_agreement")}


def test_a_temperature_off_the_grid_is_refused(cache: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not on this cache's grid"):
        DistillationTrainer(
            model=load_causal_lm(str(student)),
            cache=Cache.open(cache),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            objective=ObjectiveConfig(temperature=3.0),
        )


def _built(cache: Path, model: Any, output: Path, **settings: Any) -> DistillationTrainer:
    args = TrainingArguments(output_dir=str(output), use_cpu=True, report_to="none", max_steps=1)
    return DistillationTrainer(model=model, cache=Cache.open(cache), args=args, objective=ObjectiveConfig(), **settings)


def test_python_refuses_what_the_command_refuses(cache: Path, tmp_path: Path) -> None:
    """Packed rows, rows packed on the way, positions, vocabulary, and students that see later tokens."""
    from transformers import BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=128))
    packed = tiny_cache(tmp_path / "packed", sequence={"layout": "packed"})
    with pytest.raises(ModelError, match="OPTForCausalLM lets the documents of a packed row see each other"):
        _built(packed, opt, tmp_path)
    with pytest.raises(ModelError, match="train.pack: false"):
        _built(cache, opt, tmp_path, pack=True)
    with pytest.raises(ModelError, match="takes at most 32 tokens, rows of the cache have up to 48"):
        _built(cache, tiny_model(context=32), tmp_path)
    with pytest.raises(ModelError, match="has 200 tokens"):
        _built(cache, tiny_model(vocabulary=200), tmp_path)
    with pytest.raises(ModelError, match="student BertForMaskedLM .* sees later tokens"):
        _built(cache, BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)), tmp_path)
    _built(cache, opt, tmp_path)  # nothing to refuse
