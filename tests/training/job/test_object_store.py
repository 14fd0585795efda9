"""Training from a cache at a URL learns what training from its folder learns, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheDamaged, CacheError
from teachercache.evaluation.measure import measure
from teachercache.evaluation.recipe import run_evaluation
from teachercache.training.job.train import run_training
from teachercache.training.supervision.own_tokens import OwnTokens
from teachercache.training.supervision.reading import Reading
from training.runs import log_of, modules_of

from builders import tiny_teacher
from s3_server import Server


@pytest.fixture(scope="module")
def uploaded(cache: Path, s3_process: Server) -> str:
    return s3_process.upload(cache, "training/cache")


def _weights(recipe: Any) -> bytes:
    return (recipe.train.output / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_url_is_training_from_the_folder(
    make_recipe: Any, cache: Path, uploaded: str, s3: Server, tmp_path: Path, workers: int
) -> None:
    stream = {"local": str(tmp_path / "copies"), "local_bytes": "1 GB"}
    there = make_recipe(output=tmp_path / "there", cache_folder=uploaded, stream=stream, loader_workers=workers)
    here = make_recipe(output=tmp_path / "here")
    s3.break_next(match="shards/", kind="status", status=503, times=2)
    result = run_training(there)
    assert run_training(here)["losses"] == result["losses"]
    assert log_of(there.train.output) == log_of(here.train.output)
    assert _weights(there) == _weights(here)
    tokenizer = there.train.output / "student" / "tokenizer.json"
    assert tokenizer.read_bytes() == (cache / "teacher" / "tokenizer.json").read_bytes()
    shards = Cache.open(cache).manifest.shards
    assert s3.downloads("shards/") == len(shards) + 2, "each of them once, for all processes"
    shutil.rmtree(there.train.output / "student")  # a run belongs to a cache, wherever that is
    (there.train.output / "summary.json").unlink()
    moved = make_recipe(output=tmp_path / "there")
    assert run_training(moved)["resumed_from"] == result["steps"] and _weights(moved) == _weights(here)


def test_room_for_one_shard_is_enough(make_recipe: Any, uploaded: str, tmp_path: Path) -> None:
    stream = {"local": str(tmp_path / "copies"), "local_bytes": 1}
    there = make_recipe(output=tmp_path / "there", cache_folder=uploaded, stream=stream, loader_workers=2)
    run_training(there)
    run_training(make_recipe(output=tmp_path / "here"))
    assert log_of(there.train.output) == log_of(tmp_path / "here")


def test_a_loading_process_imports_no_trainer(uploaded: str, tmp_path: Path) -> None:
    """It is spawned: seconds, and hundreds of megabytes, for each of them."""
    cache = Cache.open(uploaded, local=tmp_path / "copies", local_bytes=10**9)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=1)
    reading = Reading(OwnTokens([cache], ObjectiveConfig()), arguments)
    [imported] = reading.loader(reading.dataset("train", [()]), [[0]], modules_of)
    assert {"torch", "teachercache.stream.dataset"} <= imported
    assert not imported & {"transformers", "deepspeed", "accelerate", "teachercache.training"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_object_ends_training_in_one_line(
    make_recipe: Any, cache: Path, s3: Server, tmp_path: Path, workers: int
) -> None:
    url = s3.upload(cache, f"training/damaged{workers}")
    for shard in (cache / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        s3.replace(f"training/damaged{workers}/shards/{shard.name}", bytes(data))
    recipe = make_recipe(cache_folder=url, stream={"local": str(tmp_path / "copies")}, loader_workers=workers)
    with pytest.raises(CacheDamaged, match=r"^s3://training/\S+\.arrow differs from its sha256 [^\n]*upload it again"):
        run_training(recipe)
    assert not list(recipe.train.output.glob("checkpoint-*"))


def test_a_url_without_a_cache_is_refused(make_recipe: Any, s3: Server, uploaded: str, tmp_path: Path) -> None:
    recipe = make_recipe(cache_folder=s3.url("training/none"), stream={"local": str(tmp_path / "copies")})
    with pytest.raises(CacheError, match="there is no cache at s3://training/none"):
        run_training(recipe)


def test_a_model_is_measured_on_rows_from_a_url(student: Path, cache: Path, uploaded: str, tmp_path: Path) -> None:
    there = measure(model=str(student), cache=uploaded, rows=2, local=tmp_path / "copies", local_bytes=10**9)
    assert there["loss"] == measure(model=str(student), cache=str(cache), rows=2)["loss"]


@pytest.mark.slow
def test_evaluation_takes_a_url(make_recipe: Any, uploaded: str, tmp_path: Path) -> None:
    stream = {"local": str(tmp_path / "copies")}
    recipe = make_recipe(cache_folder=uploaded, stream=stream, max_steps=1)
    run_training(recipe)
    shutil.rmtree(tmp_path / "copies")
    teacher = tiny_teacher(tmp_path / "teacher")
    table = run_evaluation(recipe.train.output, teacher=str(teacher), rows=4)
    assert table["teacher"]["rows"] == table["student_after"]["rows"] == 4
    assert [path for path in (tmp_path / "copies").iterdir() if len(path.name) == 64], "in the recipe's own folder"
