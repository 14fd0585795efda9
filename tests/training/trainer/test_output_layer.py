"""The loss formed inside the student's output layer is the loss of its logits, whatever the model does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.dataset import Rows
from teachercache.training.trainer.output_layer import loss_for_logits, takes_loss
from teachercache.training.trainer.trainer import DistillationTrainer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


def llama(vocabulary: int, tied: bool = True) -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **SIZES))


MODELS = {
    "tied": llama,
    "untied": lambda vocabulary: llama(vocabulary, tied=False),
    "padded": lambda vocabulary: llama(vocabulary + 13),
    "soft cap": lambda vocabulary: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=vocabulary, head_dim=8, final_logit_softcapping=3.0, **SIZES)
    ),
    "scaled": lambda vocabulary: CohereForCausalLM(CohereConfig(vocab_size=vocabulary, logit_scale=0.25, **SIZES)),
}


def trainer_of(model: Any, cache: Cache, output: Path) -> DistillationTrainer:
    arguments = TrainingArguments(
        str(output), max_steps=1, per_device_train_batch_size=3, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    objective = ObjectiveConfig(alpha=0.7, temperature=2.0)
    return DistillationTrainer(model=model, cache=cache, args=arguments, objective=objective)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_whole_logits(cache: Path, name: str, tmp_path: Path) -> None:
    opened = Cache.open(cache)
    torch.manual_seed(0)
    model = MODELS[name](opened.manifest.vocabulary_size)
    trainer = trainer_of(model, opened, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    ours = {key: weights.grad.clone() for key, weights in model.named_parameters()}
    model.zero_grad()
    inputs = {key: values for key, values in batch.items() if key not in ("shift_labels", "targets")}
    objective = DistillationObjective(ObjectiveConfig(alpha=0.7, temperature=2.0), kind=opened.kind)
    terms = objective(
        StudentOutput.of_logits(model(**inputs, use_cache=False).logits), batch["shift_labels"], batch["targets"]
    )
    expected = terms.total / terms.positions
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, weights in model.named_parameters():
        torch.testing.assert_close(ours[key], weights.grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["tied", "soft cap", "scaled"])
def test_an_empty_first_batch_decides_nothing(cache: Path, name: str, tmp_path: Path) -> None:
    """As a process gets that has no share of a short global batch."""
    opened = Cache.open(cache)
    torch.manual_seed(0)
    model = MODELS[name](opened.manifest.vocabulary_size)
    trainer, fresh = trainer_of(model, opened, tmp_path), trainer_of(model, opened, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert float(trainer.compute_loss(model, trainer.data_collator(Rows(0, [])))) == 0
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), fresh.compute_loss(model, dict(batch)))


def test_no_logits_of_a_batch_are_formed_unless_the_model_scales_them(cache: Path, tmp_path: Path) -> None:
    opened = Cache.open(cache)
    for name, plain in (("soft cap", True), ("scaled", False)):
        model = MODELS[name](opened.manifest.vocabulary_size)
        trainer = trainer_of(model, opened, tmp_path)
        batch, widths = next(iter(trainer.get_train_dataloader())), []
        model.register_forward_hook(lambda _, args, output, widths=widths: widths.append(output.logits.shape[-1]))
        trainer.compute_loss(model, dict(batch))
        trainer.evaluate()
        assert widths.pop(0) == 1  # the trial
        assert set(widths) == {1 if plain else opened.manifest.vocabulary_size}


@pytest.mark.parametrize("name", ["tied", "soft cap"])
def test_evaluation_in_the_layer_is_that_of_whole_logits(cache: Path, name: str, tmp_path: Path) -> None:
    opened = Cache.open(cache)
    torch.manual_seed(0)
    trainer = trainer_of(MODELS[name](opened.manifest.vocabulary_size), opened, tmp_path)
    ours = trainer.evaluate()
    trainer.batch_loss.in_layer = False
    expected = trainer.evaluate()
    for metric in ("loss", "kl", "accuracy", "top1_agreement"):
        assert ours[f"eval_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = MODELS["soft cap"](50)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(KeyError), loss_for_logits(model, lambda *_: {}["no such loss"]):
            model(ids)
        torch.testing.assert_close(model(ids).logits, before)


def test_other_output_layers_are_left_alone() -> None:
    model = llama(50)
    assert takes_loss(model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 50))
    assert not takes_loss(model)


class WritesToLogits(LlamaForCausalLM):
    """Rules out some tokens after the projection, as some models do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[:, :, [3, 4]] = -100.0
        return output


def test_a_model_that_writes_to_its_logits_keeps_them() -> None:
    model = WritesToLogits(LlamaConfig(vocab_size=50, **SIZES)).train()
    assert not takes_loss(model)
    assert model.training and "forward" not in vars(model.lm_head)
    assert not takes_loss(MODELS["scaled"](50))
