"""Beginnings of rows, from the corpus to both sides of an alignment: caches made by the real stages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from cache.forgery import sign
from teachercache.cache import SPLITS, Cache, verify
from teachercache.cache.files.digests import fingerprint_of
from teachercache.config import ObjectiveConfig, StudentConfig
from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.precompute.align.job import run_align
from teachercache.precompute.capture.plan import make_plan
from teachercache.stream.alignment import alignment_for
from teachercache.stream.beginnings import warnings_of
from teachercache.tokens.prefix import own_prefix
from teachercache.training.supervision.choice import supervision_of
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import (
    aligned,
    beginning_with,
    build_cache,
    other_student,
    other_tokenizer,
    sentences,
    tiny_cache,
    tiny_model,
    tiny_recipe,
    tiny_teacher,
    tiny_tokenizer,
)

TEXTS = [*sentences(4), *(" ".join(sentences(4, seed=seed)) for seed in range(4)), "naïve café — 日本語 🙂 ok"]
FLOAT = {"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tokenizer puts BOS before a text."""
    return tiny_teacher(tmp_path_factory.mktemp("t") / "teacher", tokenizer=beginning_with(tiny_tokenizer(), "<bos>"))


def segments_of(row: Any) -> list[slice]:
    starts = [segment.start for segment in row.segments]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], row.length], strict=True)]


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_every_window_of_a_cache_begins_with_bos_and_holds_what_the_teacher_says_then(
    tmp_path: Path, teacher: Path, layout: str
) -> None:
    folder = tiny_cache(
        tmp_path, teacher=teacher, texts=TEXTS, targets=FLOAT, sequence={"length": 24, "layout": layout}
    )
    cache, model = Cache.open(folder), load_causal_lm(str(teacher))
    bos = load_tokenizer(str(teacher)).bos_token_id
    assert cache.manifest.prefix_ids == (bos,) and verify(folder) == []
    later = 0
    for split in SPLITS:
        for index in range(cache.rows_of(split)):
            stored = cache.read_row(split, index)
            row, said = stored.row, iter(stored.targets["actual_log_prob"].tolist())
            for part, segment in zip(segments_of(row), row.segments, strict=True):
                ids, mask = torch.from_numpy(row.input_ids_S[part].astype(np.int64)), row.target_mask_S[part]
                with torch.no_grad():
                    own = model(ids[None]).logits[0].log_softmax(-1)
                assert ids[0] == bos and bos not in ids[1:]
                for place in np.flatnonzero(mask).tolist():
                    assert next(said) == pytest.approx(float(own[place, ids[place + 1]]), abs=1e-4)
                later += segment.byte_start > 0
            assert bos not in row.labels_N()
    assert later > 10


def test_how_rows_begin_is_part_of_what_a_cache_is(tmp_path: Path, teacher: Path) -> None:
    """And absent where neither tokenizer nor recipe puts anything before a text: such caches are what they were."""
    plain = tiny_teacher(tmp_path / "plain")
    plans = {
        choice: make_plan(tiny_recipe(tmp_path / f"{choice}", teacher=teacher, sequence={"prefix": choice}))
        for choice in ("auto", "bos", "eos", "none")
    }
    bos, eos = (getattr(load_tokenizer(str(teacher)), f"{name}_token_id") for name in ("bos", "eos"))
    assert {choice: plan.prefix_ids for choice, plan in plans.items()} == {
        "auto": (bos,), "bos": (bos,), "eos": (eos,), "none": ()
    }  # fmt: skip
    assert plans["none"].identity["tokenizer"]["prefix_ids"] == []
    assert len({fingerprint_of(plan.settings("float32")) for plan in plans.values()}) == 4
    without = make_plan(tiny_recipe(tmp_path / "without", teacher=plain))
    assert "prefix_ids" not in without.identity["tokenizer"]
    assert set(without.identity["sequence"]) == {"layout", "length", "add_eos"}
    context = make_plan(tiny_recipe(tmp_path / "context", teacher=plain, sequence={"context": 8}))
    assert context.identity["sequence"]["context"] == 8


def test_context_is_read_and_no_target(tmp_path: Path) -> None:
    """The same labels, each once, with more of their own text before them; the teacher reads so much more."""
    plain = tiny_teacher(tmp_path / "plain")
    rows: dict[int, list[Any]] = {}
    for context in (0, 8):
        recipe = tiny_recipe(
            tmp_path / str(context), teacher=plain, texts=TEXTS, sequence={"length": 24, "context": context}
        )
        cache = Cache.open(build_cache(recipe))
        rows[context] = [cache.read_row(split, n).row for split in SPLITS for n in range(cache.rows_of(split))]
    counted = {context: sum(row.positions for row in found) for context, found in rows.items()}
    tokens = {context: sum(row.length for row in found) for context, found in rows.items()}
    assert counted[0] == counted[8] and tokens[0] < tokens[8] < tokens[0] * 24 / (24 - 8 - 1)
    later = [row for row in rows[8] if row.segments[0].byte_start]
    assert later and all(int(np.flatnonzero(row.target_mask_S)[0]) == 8 for row in later)


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize(
    ("theirs", "own"),
    [((), ("<s>",)), (("<bos>",), ("<s>", "<lang>")), (("<bos>",), ())],
    ids=["none-1", "1-2", "1-none"],
)
def test_a_students_rows_begin_as_its_own_tokenizer_has_it(
    tmp_path: Path, layout: str, theirs: tuple[str, ...], own: tuple[str, ...]
) -> None:
    """In every window and segment; never aligned, never a target."""
    tokenizer = other_tokenizer()
    tokenizer = beginning_with(tokenizer, *own) if own else tokenizer
    teacher = tiny_teacher(
        tmp_path / "teacher", tokenizer=beginning_with(tiny_tokenizer(), *theirs) if theirs else None
    )
    cache = tiny_cache(tmp_path, teacher=teacher, texts=TEXTS, sequence={"length": 24, "layout": layout, "context": 3})
    student = other_student(tmp_path / "student", tokenizer=tokenizer)
    aligned(cache, student)
    found = Cache.open(cache)
    alignment = alignment_for(found, load_tokenizer(str(student)), student="student")
    prefix = list(own_prefix(tokenizer))
    assert alignment is not None and len(prefix) == len(own) and alignment.manifest.tokenizer["prefix_ids"] == prefix
    later = 0
    for split in SPLITS:
        for index in range(found.rows_of(split)):
            stored = found.read_row(split, index)
            row = alignment.aligned_row(split, index, stored)
            counts = [row.targets[name] for name in ("teacher_counts", "student_counts", "aligned")]
            aligned_S = np.repeat(counts[2] > 0, counts[1])
            aligned_T = np.repeat(counts[2] > 0, counts[0])
            for part, segment in zip(segments_of(row.row), stored.row.segments, strict=True):
                ids, mask = row.row.input_ids_S[part].tolist(), row.row.target_mask_S[part]
                begin = len(prefix)
                assert ids[:begin] == prefix and not aligned_S[part][:begin].any()
                assert not mask[: max(begin - 1, 0)].any() and not set(prefix) & set(ids[begin:])
                text = [token for token in ids[begin:] if token != tokenizer.eos_token_id]
                assert text == tokenizer(segment.text, add_special_tokens=False)["input_ids"]
                later += segment.byte_start > 0
            for part in segments_of(stored.row):
                assert not aligned_T[part][: len(theirs)].any()
    assert later > 10 and verify(cache) == []


@pytest.mark.parametrize(("choice", "begins"), [("bos", False), ("eos", True), ("none", True)])
def test_a_students_rows_begin_as_the_recipe_says(tmp_path: Path, teacher: Path, choice: str, begins: bool) -> None:
    """In its own tokens, whatever its tokenizer would put there; so does the tokenizer that an export gets, and by either the
    alignment is found."""
    tokenizer = other_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer = beginning_with(tokenizer, "<s>") if begins else tokenizer
    student = other_student(tmp_path / "student", tokenizer=tokenizer)
    cache = tiny_cache(tmp_path, teacher=teacher, texts=TEXTS[:4], sequence={"length": 24, "prefix": choice})
    aligned(cache, student)
    found = Cache.open(cache)
    alignment = alignment_for(found, load_tokenizer(str(student)), student="student")
    assert alignment is not None
    index = getattr(tokenizer, f"{choice}_token_id", None)
    prefix = [] if index is None else [index]
    assert alignment.manifest.tokenizer["prefix_ids"] == prefix and len(prefix) == (choice != "none")
    supervision = supervision_of([found], ObjectiveConfig(), alignments=[alignment])
    with supervision.exported_tokenizer(StudentConfig(model=str(student))) as folder:
        exported = load_tokenizer(str(folder))
    again = alignment_for(found, exported, student="exported")
    assert list(own_prefix(exported)) == prefix
    assert again is not None and again.manifest.fingerprint == alignment.manifest.fingerprint
    for number in range(found.rows_of("train")):
        stored = found.read_row("train", number)
        ids = alignment.aligned_row("train", number, stored).row.input_ids_S.tolist()
        begun = exported(stored.row.segments[0].text)["input_ids"]
        assert ids[: len(begun)] == begun


@pytest.mark.parametrize("choice", ["bos", "eos", "none"])
def test_an_exported_tokenizer_begins_texts_as_the_rows_did(tmp_path: Path, teacher: Path, choice: str) -> None:
    """Also that of a student which keeps its own, with further tokens; the cache takes both for its own."""
    cache = Cache.open(tiny_cache(tmp_path, teacher=teacher, texts=TEXTS[:4], sequence={"prefix": choice}))
    more = load_tokenizer(str(teacher))
    more.add_tokens(["<more>"])
    wider = tmp_path / "wider"
    tiny_model(vocabulary=len(more)).save_pretrained(wider)
    more.save_pretrained(wider)
    for model in (teacher, wider):
        supervision = supervision_of([cache], ObjectiveConfig())
        with supervision.exported_tokenizer(StudentConfig(model=str(model))) as folder:
            exported = load_tokenizer(str(folder))
        row = cache.read_row("train", 0).row
        assert own_prefix(exported) == cache.manifest.prefix_ids
        assert ("<more>" in exported.get_vocab()) == (model == wider)
        begun = exported(row.segments[0].text)["input_ids"]
        assert row.input_ids_S.tolist()[: len(begun)] == begun
        assert model == wider or alignment_for(cache, exported, student="exported") is None


def test_a_cache_that_does_not_say_how_its_rows_begin_is_warned_of_once(tmp_path: Path, teacher: Path) -> None:
    """As earlier versions left it; not where nothing stands before a text, and not where the recipe took it away."""
    texts = sentences(6)
    said, taken = (
        tiny_cache(tmp_path / choice, teacher=teacher, texts=texts, sequence={"prefix": choice})
        for choice in ("auto", "none")
    )
    plain = tiny_cache(tmp_path / "plain", texts=texts)
    assert warnings_of([Cache.open(each) for each in (said, taken, plain)]) == []
    sign(said, lambda data: data["settings"]["tokenizer"].pop("prefix_ids"))
    (line,) = warnings_of([Cache.open(said), Cache.open(plain)])
    assert (
        str(said) in line and "puts <bos> before a text" in line and "precompute it again" in line and "\n" not in line
    )


def test_aligning_and_training_from_python_warn_of_such_a_cache_too(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tiny_cache(tmp_path / "c", teacher=teacher, texts=sentences(6))
    sign(cache, lambda data: data["settings"]["tokenizer"].pop("prefix_ids"))
    said = io.StringIO()
    with pytest.raises(ModelError, match="does not exist"):  # the warning comes first
        run_align(cache, student="./nowhere", console=Console(file=said, width=1000))
    assert said.getvalue().count("puts <bos> before a text") == 1

    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    for warn in (True, False):
        caplog.clear()
        DistillationTrainer(
            model=load_causal_lm(str(teacher)), cache=Cache.open(cache), args=arguments, objective=ObjectiveConfig(),
            warn=warn,
        )  # fmt: skip
        assert caplog.text.count("puts <bos> before a text") == warn


def test_labels_stand_for_all_bytes_of_the_text_once(tmp_path: Path, teacher: Path) -> None:
    """So that bits per byte are of the text, and `inspect` shows each row as it is read."""
    from teachercache.cache.inspection import describe_row
    from teachercache.evaluation.quality import label_bytes

    folder = tiny_cache(
        tmp_path, teacher=teacher, texts=TEXTS[:-1], corpus={"held_out": 0}, sequence={"length": 24, "context": 5}
    )
    cache = Cache.open(folder)
    rows = [cache.read_row("train", index) for index in range(cache.rows_of("train"))]
    assert label_bytes(rows, cache) == sum(len(text.encode()) for text in TEXTS[:-1])
    later = next(n for n, stored in enumerate(rows) if stored.row.segments[0].byte_start)
    tokens = describe_row(cache, f"train:{later}")["tokens"]
    assert len(tokens) == rows[later].row.length and "<bos>" in str(tokens[0])
