"""Adapters through peft: little is trained, the loss is the same one, and what leaves the run is a plain student."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from teachercache.config import StudentConfig
from teachercache.errors import ModelError, RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.training.initialise.lora import with_adapters, write_merged
from teachercache.training.job.train import run_training
from training.runs import kill_after, log_of, losses_of, start_job

from builders import tiny_model


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_learn_and_leave_a_plain_student(make_recipe: Any, student: Path, stage: int) -> None:
    import peft

    recipe = make_recipe(lora={"rank": 4}, zero_stage=stage, epochs=3, evaluate_every=100, gradient_checkpointing=True)
    result = run_training(recipe)
    losses = losses_of(recipe.train.output)
    assert losses[-1] < 0.9 * losses[0]
    run = recipe.train.output
    exported, before = load_causal_lm(result["student"]), load_causal_lm(str(student))
    assert {name for name, _ in exported.named_parameters()} == {name for name, _ in before.named_parameters()}
    ids = torch.arange(20)[None]
    adapted = peft.PeftModel.from_pretrained(before, str(run / "adapters")).eval()
    torch.testing.assert_close(exported(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    weights = load_file(run / "adapters" / "adapter_model.safetensors")
    assert weights and all(".lora_" in name for name in weights)
    embedding = exported.get_input_embeddings().weight
    assert torch.equal(embedding, load_causal_lm(str(student)).get_input_embeddings().weight)  # frozen


def test_the_loss_is_formed_in_the_output_layer_of_an_adapted_student(
    make_recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_training(make_recipe(lora={"rank": 4}, max_steps=2))
    assert not [record for record in caplog.records if "logits of whole batches" in record.getMessage()]


def test_adapters_resume_as_if_nothing_had_happened(make_recipe: Any, tmp_path: Path) -> None:
    whole, halved = (make_recipe(lora={"rank": 4, "dropout": 0.1}, output=tmp_path / name) for name in ("a", "b"))
    run_training(whole)
    run_training(halved)
    run = halved.train.output
    (run / "summary.json").unlink()
    (run / "checkpoint-9" / "complete.json").unlink()
    assert run_training(halved)["resumed_from"] == 8
    assert log_of(run) == log_of(whole.train.output)
    first, second = (
        load_file(each.train.output / "adapters" / "adapter_model.safetensors") for each in (whole, halved)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_are_part_of_whose_run_it_is(make_recipe: Any) -> None:
    recipe = make_recipe(lora={"rank": 4}, max_steps=2)
    run_training(recipe)
    assert json.loads((recipe.train.output / "run.json").read_text())["recipe"]["student"]["lora"]["rank"] == 4
    with pytest.raises(RecipeError, match=r"student.lora.rank was 4, now 8"):
        run_training(make_recipe(lora={"rank": 8}, max_steps=2))


def test_layers_that_the_student_does_not_have_are_refused(make_recipe: Any) -> None:
    with pytest.raises(ModelError, match=r"student.lora.target_modules: .*gate_of_heaven"):
        run_training(make_recipe(lora={"target_modules": ["gate_of_heaven"]}))
    for broken, why in ((".*", "Target module LlamaModel is not supported"), ("*q_proj", "nothing to repeat")):
        with pytest.raises(ModelError, match=f"student.lora.target_modules: {why}"):
            run_training(make_recipe(lora={"target_modules": broken}))


def test_adapters_of_a_tied_output_layer_are_refused(make_recipe: Any) -> None:
    """Merged, they would change the input embedding as well."""
    for names in (
        ["lm_head", "q_proj"],
        ["embed_tokens"],
        "lm_head",
        ".*(q_proj|lm_head)",
        ["model.embed_tokens"],
    ):
        with pytest.raises(ModelError, match=r"student.lora.target_modules: embed_tokens and lm_head share one weight"):
            run_training(make_recipe(lora={"target_modules": names}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        "all-linear",
        "ALL-LINEAR",
        ("q_proj", "down_proj"),
        ("layers.0.self_attn.v_proj",),
        r".*\.0\..*(q|o)_proj",
        r"model\.layers\.\d\.mlp\.(up|gate)_proj",
        ("q_proj", "lm_head"),
        ("embed_tokens",),
        r".*(q_proj|lm_head)",
        r".*(embed_tokens|v_proj)",
    ],
)
def test_what_is_exported_is_what_was_trained(tmp_path: Path, names: str | tuple[str, ...], tied: bool) -> None:
    """Or refused: whichever way layers are named."""
    tiny_model(tied=tied).save_pretrained(tmp_path / "base")
    settings = StudentConfig.model_validate({"model": str(tmp_path / "base"), "lora": {"target_modules": names}})
    of_both = tied and any(part in "".join(names) for part in ("lm_head", "embed_tokens"))
    with pytest.raises(ModelError, match="share one weight") if of_both else nullcontext():
        trained = with_adapters(load_causal_lm(settings.model), settings.lora, seed=0)
    if of_both:
        return
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    trained.save_pretrained(tmp_path / "checkpoint")
    write_merged(tmp_path / "checkpoint", settings, tmp_path / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, plain = trained.eval()(ids).logits, load_causal_lm(settings.model)(ids).logits
        torch.testing.assert_close(load_causal_lm(str(tmp_path / "merged"))(ids).logits, expected, atol=2e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_go_on_with_another_number_of_processes(
    make_recipe: Any, plain_student: Path, tmp_path: Path, stage: int
) -> None:
    settings = {"lora": {"rank": 4}, "zero_stage": stage, "epochs": 3, "save_every": 3, "evaluate_every": 100}
    settings["student_model"] = plain_student
    whole, changed = (make_recipe(output=tmp_path / name, **settings) for name in ("whole", "changed"))
    assert start_job(whole, tmp_path, processes=1).wait() == 0
    kill_after(start_job(changed, tmp_path, processes=2), changed.train.output, 6)
    assert run_training(changed)["resumed_from"] >= 6
    assert losses_of(changed.train.output) == pytest.approx(losses_of(whole.train.output), abs=1e-4)
