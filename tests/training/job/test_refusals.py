"""Settings that do not fit are refused before the first step, in one line that names the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import Cache
from teachercache.errors import CacheDamaged, CacheError, JobFailed, ModelError, RecipeError, UserError
from teachercache.models.loading import load_tokenizer
from teachercache.training.job.train import run_training
from teachercache.training.supervision.fit import check_packing

from builders import other_student, tiny_cache, tiny_model, tiny_tokenizer


def _refused(recipe: Any, kind: type[UserError]) -> str:
    with pytest.raises(kind) as refusal:
        run_training(recipe)
    assert not list(recipe.train.output.glob("checkpoint-*"))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_vocabulary_that_is_too_small(make_recipe: Any, tmp_path: Path) -> None:
    tiny_model(vocabulary=200).save_pretrained(tmp_path / "small")
    message = _refused(make_recipe(student_model=tmp_path / "small"), ModelError)
    assert "has 200 tokens" in message and "300" in message and "init-student" in message


def test_a_padded_vocabulary_is_welcome(make_recipe: Any, tmp_path: Path) -> None:
    tiny_model(vocabulary=320).save_pretrained(tmp_path / "padded")
    assert run_training(make_recipe(student_model=tmp_path / "padded", max_steps=1))["steps"] == 1


def test_another_tokenizer(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    message = _refused(make_recipe(student_model=other_student(tmp_path / "other")), CacheError)
    assert "has no alignment with the tokenizer of" in message and "teachercache align" in message


def test_more_special_tokens_are_no_other_tokenizer(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "more")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.eos_token = "<new>"  # as a base model's
    tokenizer.save_pretrained(tmp_path / "more")
    result = run_training(make_recipe(student_model=tmp_path / "more", max_steps=1))
    assert result["steps"] == 1
    exported = load_tokenizer(result["student"])
    assert exported.convert_tokens_to_ids("<new>") == tokenizer.convert_tokens_to_ids("<new>")
    assert exported.eos_token == "<eos>"  # what rows end with


def test_rows_longer_than_the_student_takes(make_recipe: Any, tmp_path: Path) -> None:
    tiny_model(context=32).save_pretrained(tmp_path / "short")
    message = _refused(make_recipe(student_model=tmp_path / "short"), ModelError)
    assert "at most 32 tokens" in message and "48" in message and "sequence.length=32" in message


def test_a_model_that_sees_through_packing(make_recipe: Any, tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    packed = tiny_cache(tmp_path / "packed", sequence={"layout": "packed"})
    message = _refused(make_recipe(cache_folder=packed, student_model=tmp_path / "bloom"), ModelError)
    assert "see each other" in message and "sequence.layout=documents" in message
    message = _refused(make_recipe(student_model=tmp_path / "bloom", pack=True), ModelError)
    assert "see each other" in message and "train.pack: false" in message


def test_packing_is_tried_with_tokens_that_the_student_has(tmp_path: Path) -> None:
    """A student with another tokenizer may have far fewer than the teacher."""
    packed = tiny_cache(tmp_path / "packed", sequence={"layout": "packed"})
    few = tiny_model(vocabulary=40)
    check_packing(few, "few", Cache.open(packed).manifest, vocabulary_size=40)


def test_a_temperature_off_the_grid(make_recipe: Any) -> None:
    message = _refused(make_recipe(objective={"temperature": 3.0}), CacheError)
    assert "1, 2, 4, 8" in message


def test_a_student_that_is_not_there(make_recipe: Any, tmp_path: Path) -> None:
    assert "does not exist" in _refused(make_recipe(student_model=tmp_path / "nowhere"), ModelError)


def test_a_cache_that_is_half_written(make_recipe: Any, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    assert "precompute" in _refused(make_recipe(cache_folder=tmp_path / "half"), CacheError)


def test_a_cache_without_train_rows(make_recipe: Any, tmp_path: Path) -> None:
    held_out = tiny_cache(tmp_path / "held", corpus={"held_out": 0.999})
    assert "are held out" in _refused(make_recipe(cache_folder=held_out), CacheError)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_bytes_never_reach_training(make_recipe: Any, cache: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(cache, tmp_path / "damaged")
    shard = max((tmp_path / "damaged" / "shards").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheDamaged, match=rf"^\S*{shard.name} differs from its sha256 [^\n]*$"):
        run_training(make_recipe(cache_folder=tmp_path / "damaged", loader_workers=workers))


def test_a_tracker_that_is_not_there(make_recipe: Any) -> None:
    assert "sheet of paper" in _refused(make_recipe(trackers=["sheet of paper"]), RecipeError)


def test_a_refused_run_may_be_mended_in_place(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    tiny_model(vocabulary=200).save_pretrained(tmp_path / "small")
    _refused(make_recipe(student_model=tmp_path / "small", max_steps=1), ModelError)
    assert run_training(make_recipe(student_model=student, max_steps=1))["steps"] == 1


def test_a_precision_that_the_machine_lacks(make_recipe: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this machine computes in fp16")
    assert "use fp32 or bf16" in _refused(make_recipe(precision="fp16"), RecipeError)


def test_a_deepspeed_file_that_contradicts_the_recipe(make_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 16}')
    assert "train_micro_batch_size_per_gpu=16" in _refused(make_recipe(deepspeed=tmp_path / "ds.json"), RecipeError)


def test_a_loss_that_is_not_finite_ends_the_run(make_recipe: Any) -> None:
    recipe = make_recipe(learning_rate=1e30, warmup_fraction=0.0, max_grad_norm=1e9, zero_stage=0)
    with pytest.raises(JobFailed, match=r"the loss at step \d is nan; .*learning_rate"):
        run_training(recipe)


def test_gradients_that_are_never_finite_end_the_run(make_recipe: Any) -> None:
    # Under ZeRO such steps are skipped: weights stay as they are, and so would the loss for the rest of the run.
    recipe = make_recipe(learning_rate=1e30, warmup_fraction=0.0, max_grad_norm=1e9, zero_stage=1, epochs=4)
    with pytest.raises(JobFailed, match=r"not finite in the 21 steps .*learning_rate"):
        run_training(recipe)


def test_a_recipe_without_a_student(make_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="`student:`"):
        run_training(make_recipe().model_copy(update={"student": None}))
