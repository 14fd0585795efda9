"""A recipe to a DeepSpeed configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachercache.config import TrainConfig
from teachercache.errors import RecipeError
from teachercache.training.job.deepspeed_config import deepspeed_config, own_deepspeed_settings, precision_of
from teachercache.training.job.launch import training_process
from teachercache.training.job.train import run_training
from training.runs import losses_of

EXAMPLES = sorted((Path(__file__).parents[3] / "infra" / "deepspeed").glob("*.json"))


def _config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"output": "run", **settings})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_and_precision_arrive(stage: Any, precision: Any) -> None:
    made = deepspeed_config(_config(zero_stage=stage, precision=precision), on_gpu=True)
    assert made["zero_optimization"]["stage"] == (1 if (stage, precision) == (0, "bf16") else stage)
    assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert precision_of(made, "fp32") == precision
    json.dumps(made)


def test_fp16_scales_its_loss_dynamically() -> None:
    fp16 = deepspeed_config(_config(precision="fp16"), on_gpu=True)["fp16"]
    assert fp16["loss_scale"] == 0 and fp16["initial_scale_power"] == 16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_sums_the_gradients_of_micro_batches_in_float32(stage: Any) -> None:
    """DeepSpeed itself: one gradient of 1 and 256 of 2^-9, each of which is lost beside 1 in bf16, come to 1.5."""
    import deepspeed

    settings = deepspeed_config(_config(precision="bf16", zero_stage=stage), on_gpu=False)
    micro_steps = 257
    settings |= {
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": micro_steps, "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 0.0,
    }  # fmt: skip
    with training_process():
        model = torch.nn.Linear(4, 2, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for step in range(micro_steps):
            size = 1.0 if step == 0 else 2**-9
            # DeepSpeed divides by their number.
            engine.backward(engine(torch.full((1, 4), size, dtype=torch.bfloat16)).sum() * micro_steps)
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            learned = -model.weight.detach().float()
        engine.destroy()
    torch.testing.assert_close(learned, torch.full((2, 4), 1.5), atol=0.01, rtol=0)


def test_the_users_own_file_wins(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
    }
    (tmp_path / "own.json").write_text(json.dumps(own))
    made = deepspeed_config(_config(deepspeed=tmp_path / "own.json", zero_stage=1, precision="bf16"), on_gpu=True)
    assert made["zero_optimization"]["stage"] == 3 and made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert made["gradient_clipping"] == "auto"
    assert precision_of(made, "bf16") == "bf16" and precision_of(made, "fp32") == "fp32"


def test_loading_a_conversion_is_no_setting_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"checkpoint": {"load_universal": True, "tag_validation": "Ignore"}}))
    assert own_deepspeed_settings(_config(deepspeed=path)) == {"checkpoint": {"tag_validation": "Ignore"}}
    path.write_text(json.dumps({"checkpoint": {"load_universal": True}}))
    assert own_deepspeed_settings(_config(deepspeed=path)) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            r'offload_param on nvme.*use .*"cpu"',
        ),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}', "offload_optimizer on nvme"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        deepspeed_config(_config(deepspeed=path), on_gpu=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_usable(path: Path) -> None:
    made = deepspeed_config(_config(deepspeed=path, precision="bf16"), on_gpu=True)
    assert precision_of(made, "bf16") == "bf16" and made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_train_and_resume(make_recipe: Any, tmp_path: Path, path: Path) -> None:
    """As they are, and what the stage learns without them: offloading moves numbers, and changes none."""
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    settings = {"max_steps": 4, "evaluate_every": 2}
    plain = make_recipe(output=tmp_path / "plain", zero_stage=stage, **settings)
    offloaded = make_recipe(output=tmp_path / "offloaded", deepspeed=path, **settings)
    run_training(plain)
    assert run_training(offloaded)["zero_stage"] == stage
    run = offloaded.train.output
    expected = losses_of(plain.train.output)
    np.testing.assert_allclose(losses_of(run), expected, rtol=1e-6)
    assert expected[-1] < expected[0]

    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    assert run_training(offloaded)["resumed_from"] == 2
    np.testing.assert_allclose(losses_of(run), expected, rtol=1e-6)
