"""README's own recipe runs as it stands: only the models, the text and what this machine cannot do are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teachercache.config import load_recipe
from teachercache.training.job.train import run_training

from builders import build_cache, sentences, tiny_teacher
from pages import README, blocks

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.slow
def test_the_readmes_recipe_runs(tmp_path: Path) -> None:
    (written,) = blocks(README, "yaml")
    (tmp_path / "chat.yaml").write_text(written, encoding="utf-8")
    said = sentences(160, words=12)
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(said[::2], said[1::2], strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    replaced = {
        "cache": tmp_path / "cache",
        "corpus.source": tmp_path / "chats.jsonl",
        "teacher.model": tiny_teacher(tmp_path / "teacher", chat_template=TEMPLATE, context=2048),
        "student.model": tiny_teacher(tmp_path / "student", chat_template=TEMPLATE, context=2048, seed=1),
        "teacher.dtype": "float32",
        "train.precision": "fp32",
        "train.output": tmp_path / "run",
        "train.global_batch": 8,
        "train.max_steps": 2,
        "targets.logits.calibration_positions": 400,
        "precompute.threads_per_actor": 1,
        "train.loader_workers": 0,
    }
    recipe = load_recipe(tmp_path / "chat.yaml", [f"{key}={value}" for key, value in replaced.items()])
    build_cache(recipe)
    summary = run_training(recipe)
    assert summary["steps"] == 2 and (tmp_path / "run" / "student" / "config.json").is_file()
