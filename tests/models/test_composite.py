"""Models of text and images: the decoder of text is one part, with a config of its own inside the model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig, Recipe, parse_recipe
from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm
from teachercache.sampling.job import run_sampling
from teachercache.training.initialise.init_student import init_student
from teachercache.training.job.train import run_training
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import tiny_cache, tiny_tokenizer
from tiny_models import composite_model

ROOT = Path(__file__).parents[2]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "mistral3")]
NAMES = ["gemma3", "qwen2_5_vl", *SLOW]


def saved(name: str, folder: Path) -> Path:
    composite_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a teacher of this kind; its rows are shorter than 48 tokens."""
    folder = tmp_path_factory.mktemp("cache")
    return tiny_cache(folder, teacher=saved("gemma3", folder / "teacher"))


@pytest.mark.parametrize("name", NAMES)
def test_a_teachers_targets_are_its_own(name: str, tmp_path: Path) -> None:
    model = composite_model(name)
    opened = Cache.open(tiny_cache(tmp_path / "c", teacher=saved(name, tmp_path / "teacher")))
    assert opened.manifest.model["architecture"] == type(model).__name__
    for index in range(3):
        stored = opened.read_row("train", index)
        row = stored.row
        with torch.no_grad():
            logits_SV = model(input_ids=torch.from_numpy(row.input_ids_S).long()[None]).logits[0]
        labels_N = torch.from_numpy(row.labels_N()).long()[:, None]
        exact_N = logits_SV[torch.from_numpy(row.target_mask_S), :300].log_softmax(-1).gather(1, labels_N)[:, 0]
        assert torch.allclose(torch.from_numpy(stored.targets["actual_log_prob"]).float(), exact_N, atol=5e-3)


def _trained(cache: Path, student: Path, run: Path) -> Any:
    args = TrainingArguments(
        str(run), max_steps=3, per_device_train_batch_size=4, learning_rate=3e-3, use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=load_causal_lm(str(student)), cache=Cache.open(cache), args=args, objective=ObjectiveConfig()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_a_student_learns_and_its_config_stays_as_it_was(name: str, cache: Path, tmp_path: Path) -> None:
    student = saved(name, tmp_path / "student")
    trainer = _trained(cache, student, tmp_path / "run")
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "out"))
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "use_cache" not in exported and exported["text_config"]["use_cache"] is True
    reloaded = load_causal_lm(str(tmp_path / "out"))
    ids_BS = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids_BS).logits, trainer.model.eval()(input_ids=ids_BS).logits)


def _recipe(cache: Path, student: Path, run: Path, **train: Any) -> Recipe:
    settings = {
        "global_batch": 8,
        "micro_batch": 2,
        "max_steps": 2,
        "log_every": 1,
        "loader_workers": 0,
        "trackers": [],
    }
    return parse_recipe(
        {
            "cache": str(cache),
            "student": {"model": str(student)},
            "train": {**settings, "output": str(run), **train},
        },
        origin="tests",
    )


def test_the_exported_student_is_whole(cache: Path, tmp_path: Path) -> None:
    result = run_training(_recipe(cache, saved("gemma3", tmp_path / "student"), tmp_path / "run", zero_stage=1))
    exported = load_causal_lm(result["student"])
    assert type(exported).__name__ == "Gemma3ForConditionalGeneration"
    before = load_causal_lm(str(tmp_path / "student")).state_dict()
    assert exported.state_dict().keys() == before.keys()
    same = {name for name, weights in exported.state_dict().items() if torch.equal(weights, before[name])}
    assert any("vision" in name for name in same) and not any("language_model.layers" in name for name in same)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_processes_train_it(cache: Path, tmp_path: Path, stage: int) -> None:
    """Its images' side gets no gradient."""
    recipe = _recipe(cache, saved("gemma3", tmp_path / "student"), tmp_path / "run", zero_stage=stage)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "OMP_NUM_THREADS": "1"}
    job = [str(ROOT / "jobs" / "train_student.py"), str(path), "--json"]
    done = subprocess.run([*launcher, *job], capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["zero_stage"] == stage
    assert load_causal_lm(str(tmp_path / "run" / "student")) is not None


def test_positions_are_those_of_the_text(cache: Path, tmp_path: Path) -> None:
    model = composite_model("gemma3")
    model.config.text_config.max_position_embeddings = 40
    model.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(ModelError, match="takes at most 40 tokens, rows of the cache have up to 48"):
        run_training(_recipe(cache, tmp_path / "short", tmp_path / "run"))
    sampling = parse_recipe({"cache": str(cache), "corpus": {"source": "python-docs"}}, origin="tests")
    with pytest.raises(Exception, match="takes at most 40"):
        run_sampling(sampling, out=tmp_path / "out.jsonl", student=str(tmp_path / "short"), new_tokens=40)


def test_a_student_is_made_of_its_layers(tmp_path: Path) -> None:
    made = init_student(str(saved("gemma3", tmp_path / "teacher")), layers="first:1", output=tmp_path / "student")
    assert load_causal_lm(made["student"]).config.get_text_config().num_hidden_layers == 1
