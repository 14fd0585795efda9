"""Text that a student writes by itself becomes a corpus that a teacher can be asked about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from teachercache.cache import Cache
from teachercache.config import Recipe, parse_recipe
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError, RecipeError
from teachercache.models.loading import load_tokenizer
from teachercache.sampling.job import run_sampling
from teachercache.sampling.prompts import prompts

from builders import beginning_with, build_cache, sentences, tiny_recipe, tiny_teacher, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL: dict[str, Any] = {"rows": 12, "prompt_tokens": 6, "new_tokens": 10, "batch": 5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_teacher(tmp_path_factory.mktemp("student"), seed=4, layers=1))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_begin_as_documents_do_and_go_on_otherwise(recipe: Recipe, student: str, tmp_path: Path) -> None:
    found = run_sampling(recipe, student=student, out=tmp_path / "s.jsonl", **SMALL)
    texts = [line["text"] for line in lines(tmp_path / "s.jsonl")]
    rows = [each for each in documents(read_rows(recipe.corpus), recipe.corpus) if isinstance(each, Document)]
    trained = [row.text for row in rows if not row.held_out]
    tokenizer = load_tokenizer(student)
    given = {tokenizer.decode(tokenizer(text)["input_ids"][: SMALL["prompt_tokens"]]) for text in trained}
    assert all(any(sample.startswith(beginning) for beginning in given) for sample in texts)
    assert not set(texts) & set(trained)
    assert len(texts) == found["rows"] == 12 and 12 <= found["tokens"] <= 120


def test_prompts_begin_as_the_rows_of_a_cache_do(recipe: Recipe) -> None:
    tokenizer = beginning_with(tiny_tokenizer(), "<bos>")
    begun, bare = (
        prompts(recipe.corpus, tokenizer, rows=5, prompt_tokens=6, seed=0, prefix=choice) for choice in ("auto", "none")
    )
    assert {prompt.ids[0] for prompt in begun} == {tokenizer.bos_token_id} and all(len(p.ids) == 6 for p in begun)
    assert not any(tokenizer.bos_token_id in prompt.ids for prompt in bare)
    text = [tokenizer.decode(prompt.ids, skip_special_tokens=True) for prompt in bare]
    assert all(any(t.startswith(tokenizer.decode(b.ids, skip_special_tokens=True)) for t in text) for b in begun)


def test_held_out_documents_are_never_drawn(recipe: Recipe, student: str, tmp_path: Path) -> None:
    run_sampling(recipe, student=student, out=tmp_path / "all.jsonl", **{**SMALL, "rows": 1000})
    rows = [each for each in documents(read_rows(recipe.corpus), recipe.corpus) if isinstance(each, Document)]
    assert len(lines(tmp_path / "all.jsonl")) == sum(not row.held_out for row in rows) < len(rows)


def test_seeds_draw_other_samples_and_the_same_again(recipe: Recipe, student: str, tmp_path: Path) -> None:
    names = [("a", 1), ("b", 1), ("c", 2)]
    for name, seed in names:
        run_sampling(recipe, student=student, out=tmp_path / name, seed=seed, **SMALL)
    first, again, other = ((tmp_path / name).read_text() for name, _ in names)
    assert first == again != other
    begins = [{line["text"][:8] for line in lines(tmp_path / name)} for name in ("a", "c")]
    assert begins[0] != begins[1]


def test_a_students_answers_replace_those_of_a_conversation(tmp_path: Path) -> None:
    student = tiny_teacher(tmp_path / "chatty", chat_template=TEMPLATE)
    asked = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "so it is said."}]
        for text in sentences(9, words=6)
    ]
    asked.append([{"role": "user", "content": "nobody answered"}])
    corpus = tmp_path / "chat.jsonl"
    corpus.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    section = {"source": str(corpus), "messages_field": "messages", "held_out": 0}
    recipe = tiny_recipe(tmp_path, teacher=student, corpus=section)
    run_sampling(recipe, student=str(student), out=tmp_path / "s.jsonl", **{**SMALL, "prompt_tokens": 60})
    found = [line["messages"] for line in lines(tmp_path / "s.jsonl")]
    assert len(found) == 9
    assert sorted(messages[0]["content"] for messages in found) == sorted(each[0]["content"] for each in asked[:9])
    assert all(messages[1]["role"] == "assistant" and "<eos>" not in messages[1]["content"] for messages in found)
    again = {**recipe.model_dump(mode="json"), "corpus": {**section, "source": str(tmp_path / "s.jsonl")}}
    assert Cache.open(build_cache(parse_recipe(again, origin="tests"))).rows_of("train") > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": 0.0}, RecipeError, "--temperature 0 is not positive"),
        ({"new_tokens": 500}, RecipeError, "add up to 506, and .* takes at most 256 tokens; lower one of them"),
    ],
)
def test_numbers_that_make_no_sense(
    recipe: Recipe, student: str, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_sampling(recipe, student=student, out=tmp_path / "s.jsonl", **{**SMALL, **settings})
    assert not (tmp_path / "s.jsonl").exists()


def test_conversations_need_a_student_that_can_read_them(student: str, tmp_path: Path) -> None:
    corpus = tmp_path / "chat.jsonl"
    corpus.write_text(json.dumps({"messages": [{"role": "user", "content": "so?"}]}) + "\n")
    recipe = tiny_recipe(tmp_path, corpus={"source": str(corpus), "messages_field": "messages"})
    with pytest.raises(CorpusError, match="the student's tokenizer has no chat template"):
        run_sampling(recipe, student=student, out=tmp_path / "s.jsonl", **SMALL)


def test_nothing_is_overwritten_and_nothing_to_go_on_from_is_said(recipe: Recipe, student: str, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("mine")
    with pytest.raises(RecipeError, match="exists; give another --out, or delete it"):
        run_sampling(recipe, student=student, out=tmp_path / "s.jsonl", **SMALL)
    assert (tmp_path / "s.jsonl").read_text() == "mine"
    held = tiny_recipe(tmp_path / "held", corpus={"held_out": 0.999999})
    with pytest.raises(CorpusError, match="no document that a student could go on from"):
        run_sampling(held, student=student, out=tmp_path / "other.jsonl", **SMALL)


@pytest.mark.slow
def test_rounds_of_writing_asking_and_training(student: str, tmp_path: Path) -> None:
    """As the documentation has it: `infra/on_policy`, twice, the second time with nothing left to do."""
    made = tiny_recipe(tmp_path, corpus={"held_out": 0.2})
    train = {"output": str(tmp_path / "run"), "global_batch": 8, "micro_batch": 4, "max_steps": 3, "trackers": []}
    settings = {**made.model_dump(mode="json", exclude_none=True), "student": {"model": student}, "train": train}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    build_cache(made)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "SAMPLES": "10", "NEW_TOKENS": "12", "PROMPT_TOKENS": "8",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash", str(ROOT / "infra" / "on_policy"), str(path), student, "2", str(tmp_path / "rounds")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
    last = tmp_path / "rounds" / "2"
    assert f"the student after 2 round(s): {last / 'run' / 'student'}" in done.stderr
    assert (last / "run" / "student" / "config.json").is_file() and len(lines(last / "samples.jsonl")) == 10
    run = json.loads((last / "run" / "run.json").read_text())["recipe"]
    assert run["student"]["model"] == str(tmp_path / "rounds" / "1" / "run" / "student")
    assert "nothing to do" in done.stderr
    assert subprocess.run(command[:4], capture_output=True, check=False).returncode == 2
