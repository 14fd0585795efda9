"""Whole and half checkpoint folders, and the export."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from teachercache.config import StudentConfig
from teachercache.errors import JobFailed
from teachercache.training.checkpoints import universal
from teachercache.training.checkpoints.completion import (
    checkpoint_folder,
    complete_checkpoints,
    mark_complete,
    remove_incomplete,
    rotate,
    whole_checkpoint,
)
from teachercache.training.checkpoints.resuming import damage_of, intact_checkpoint
from teachercache.training.job.export import export_student
from teachercache.training.job.stopping import Ends


def _make(run: Path, step: int, *, whole: bool = True) -> None:
    folder = checkpoint_folder(run, step)
    (folder / "global_step").mkdir(parents=True)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"state")
    if whole:
        mark_complete(folder, world_size=2)


def test_only_marked_folders_count(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        _make(tmp_path, step)
    _make(tmp_path, 200, whole=False)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    found = complete_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == [9, 10, 100] and found[0].world_size == 2
    assert remove_incomplete(tmp_path) == [tmp_path / "checkpoint-200"]
    assert (tmp_path / "checkpoint-best").is_dir() and len(complete_checkpoints(tmp_path)) == 3


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    """As where a file system does not answer: here the process has no file descriptor left."""
    for step in (9, 10):
        _make(tmp_path, step)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said: list[str] = []
    PartialState()
    [newest] = [found for found in complete_checkpoints(tmp_path) if found.step == 10]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(
            JobFailed, match=r"checkpoint-10 cannot be read \(Too many open files\); nothing was changed"
        ):
            damage_of(newest)
        with pytest.raises(JobFailed, match="nothing was changed"):
            whole_checkpoint(newest.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert intact_checkpoint(tmp_path, say=said.append) == newest and said == []


@settings(deadline=None, max_examples=20)
@given(steps=st.sets(st.integers(1, 12), min_size=1, max_size=6), keep=st.integers(1, 5), data=st.data())
def test_the_latest_and_the_best_stay(
    tmp_path_factory: object, steps: set[int], keep: int, data: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("run")  # type: ignore[attr-defined]
    best = data.draw(st.sampled_from([None, *sorted(steps)]))
    for step in steps:
        _make(run, step)
    rotate(run, keep=keep, best_step=best)
    expected = set(sorted(steps)[-keep:]) | ({best} if best else set())
    assert {checkpoint.step for checkpoint in complete_checkpoints(run)} == expected
    assert len(list(run.iterdir())) == len(expected)


def test_the_export_takes_weights_from_one_and_the_tokenizer_from_the_other(tmp_path: Path) -> None:
    checkpoint, tokenizer, student = tmp_path / "checkpoint-1", tmp_path / "teacher", tmp_path / "student"
    files = {
        checkpoint: ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                     "generation_config.json", "training_args.bin", "rng_state.pth", "trainer_state.json"],
        tokenizer: ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"],
        student: ["left-over.safetensors"],
    }  # fmt: skip
    for folder, names in files.items():
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps({"of": folder.name, "weight_map": {}}))
    weights = {"weight": torch.arange(3.0), "distillation.0.adapter": torch.zeros(2)}
    save_file(weights, checkpoint / "model-00001-of-00002.safetensors")
    ends = Ends(rows=(7,), special=frozenset({3}), tokens=9, begin=None, padding=None)
    export_student(checkpoint, config=StudentConfig(model="any"), tokenizer=tokenizer, ends=ends, student=student)
    [exported] = student.glob("*.safetensors")
    assert load_file(exported).keys() == {"weight"}  # without what maps the student to the teacher's width
    exported.unlink()
    assert {path.name: json.loads(path.read_text())["of"] for path in student.iterdir()} == {
        **dict.fromkeys([name for name in files[checkpoint][:4] if name != exported.name], "checkpoint-1"),
        **dict.fromkeys(files[tokenizer][1:], "teacher"),
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_export_takes_no_code_of_a_tokenizer(tmp_path: Path) -> None:
    checkpoint, tokenizer, student = tmp_path / "checkpoint-1", tmp_path / "teacher", tmp_path / "student"
    for folder in (checkpoint, tokenizer):
        folder.mkdir()
    save_file({"weight": torch.arange(3.0)}, checkpoint / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        (checkpoint / name).write_text("{}")
    config = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["tokenizer_evil.Evil", None]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_evil.py", "vocab.py"):
        (tokenizer / name).write_text("{}")
    ends = Ends(rows=(7,), special=frozenset({3}), tokens=9, begin=None, padding=None)
    export_student(checkpoint, config=StudentConfig(model="any"), tokenizer=tokenizer, ends=ends, student=student)
    exported = {path.name for path in student.iterdir()}
    assert exported == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert json.loads((student / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}


def test_a_pipe_is_no_conversion(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / universal.MARKER)
    assert universal.damage_of(tmp_path) is not None
    universal.discard(tmp_path)
    assert not list(tmp_path.iterdir())
