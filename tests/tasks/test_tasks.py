"""A task from outside of the package: the one of docs/design/extending.md, from its cache to a trained student."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, TrainingArguments

from teachercache import __version__
from teachercache.cache import Cache
from teachercache.cache.files.column_groups import groups_of, layout_of, target_digests
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import ShardTable
from teachercache.cache.manifest.manifest import commit_manifest
from teachercache.cache.manifest.model import Audit, Manifest, cache_fingerprint
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.stores.local import LocalStore
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, ModelError
from teachercache.evaluation.quality import held_out_rows, quality
from teachercache.models.loading import load_causal_lm, model_inputs
from teachercache.models.probes import check_sight
from teachercache.targets import Full, StoredTargets
from teachercache.tasks.contract import Task
from teachercache.tasks.known import TASKS
from teachercache.tasks.next_token import NEXT_TOKEN
from teachercache.tokens.rows import Segment, TokenRow, row_id
from teachercache.training.trainer.trainer import DistillationTrainer

from pages import ROOT, text_of

V, OUTCOMES, HELD_OUT = 40, 2, 6


def documented_task() -> Task:
    """The task of the page, as a reader would write it into a file."""
    page = text_of(ROOT / "docs" / "design" / "extending.md")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Parity" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    task = names["Parity"]()
    assert isinstance(task, Task)
    return task


def encoder(folder: Path, *, seed: int) -> Path:
    """A tiny encoder with a head of two classes, which sees all tokens of a row."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=OUTCOMES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder)
    return folder


def rows() -> list[TokenRow]:
    """Rows of unlike lengths, the last ones held out; each token but the last is a position."""
    generator, made = np.random.default_rng(0), []
    for number in range(24):
        ids_S = generator.integers(1, V, size=5 + number % 7).astype(np.int32)
        segment = Segment(f"{number:032x}", 0, 0, len(ids_S), 0)
        mask_S = np.arange(len(ids_S)) < len(ids_S) - 1
        made.append(TokenRow(row_id([segment]), number >= 24 - HELD_OUT, ids_S, mask_S, (segment,)))
    return made


def write_cache(folder: Path, teacher: Any, task: Task) -> Path:
    """A cache of what the teacher says of the rows, by the package's own kinds, writers and manifest."""
    kind, made = Full("float32", OUTCOMES), rows()
    payload = []
    for row in made:
        arrays = model_inputs([row], pad_id=0, layout="documents", is_causal=task.is_causal)
        with torch.no_grad():
            logits_SV = teacher(**{name: torch.from_numpy(values) for name, values in arrays.items()}).logits[0]
        labels_N = torch.from_numpy(task.labels_N(row).astype(np.int64))
        payload.append(kind.finish(kind.capture(torch, logits_SV[torch.from_numpy(row.target_mask_S)], labels_N)))
    settings = {
        "teacher": {"dtype": "float32"},
        "tokenizer": {"fingerprint": "none", "vocabulary_size": V, "pad_id": 0, "eos_id": 0, "prefix_ids": []},
        "sequence": {"layout": "documents", "length": 16},
        "task": {"name": task.name, "outcomes": OUTCOMES},
    }
    targets, units = {"logits": kind.settings()}, {"rows": len(made)}
    corpus = {"source": "seeded", "rows": len(made), "held_out": 0.25}
    fingerprint, digests, layout = fingerprint_of(settings), target_digests(targets, {}), layout_of(StoredTargets(kind))
    groups = groups_of(StoredTargets(kind), layout=layout, settings=fingerprint, digests=digests, read_by={})
    info, sizes = write_shard(LocalStore(folder), 0, rows=made, payload=payload, groups=groups)
    manifest = Manifest(
        fingerprint=cache_fingerprint(fingerprint, digests, corpus, units), settings_fingerprint=fingerprint,
        settings=settings, targets=targets, target_digests=digests, groups=layout, described_teacher={"model": "none"},
        model={}, corpus=corpus, units=units, audit=Audit(len(made), len(made), 0, 0, 0, 0, 0, 0),
        shards=ShardTable.of([info]), files=[], column_bytes=dict(Counter(sizes)), created_by=f"teachercache {__version__}",
    )  # fmt: skip
    commit_manifest(manifest, LocalStore(folder))
    return folder


@pytest.fixture(scope="module")
def task() -> Task:
    return documented_task()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Path:
    folder = tmp_path_factory.mktemp("task")
    teacher = load_causal_lm(str(encoder(folder / "teacher", seed=1)), task=task)
    return write_cache(folder / "cache", teacher, task)


def test_a_reader_that_does_not_know_the_task_is_told_to_upgrade(made: Path) -> None:
    with pytest.raises(CacheError, match=r"requires parity, which this version .*pip install --upgrade"):
        Cache.open(made)


def test_a_student_with_a_head_of_the_task_learns_from_its_cache(made: Path, task: Task, tmp_path: Path) -> None:
    cache = Cache.open(made, tasks=(*TASKS, task))
    model = load_causal_lm(str(encoder(tmp_path / "student", seed=2)), task=task)
    assert isinstance(model, BertForTokenClassification)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=6, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(model=model, cache=cache, args=arguments, objective=ObjectiveConfig(alpha=0.7))
    batch = trainer.data_collator(trainer.train_dataset.__getitems__([0, 3]))
    ids_BS, labels_BS = batch["input_ids"], batch["shift_labels"]
    is_position_BS = labels_BS != -100
    assert torch.equal(labels_BS[is_position_BS], ids_BS[is_position_BS] % 2)  # its own label, not the next token's
    assert batch["attention_mask"].sum(-1).tolist() == [5, 8]
    with torch.no_grad():
        log_q_NV = model.eval()(ids_BS, attention_mask=batch["attention_mask"]).logits[is_position_BS].log_softmax(-1)
        loss = trainer.compute_loss(model, dict(batch))
    log_p_NV = batch["targets"]["log_probs"]
    kl = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(log_q_NV, labels_BS[is_position_BS])
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * ce, rtol=1e-4, atol=1e-5)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < before["eval_kl"]
    measured = quality(model, held_out_rows(cache, limit=None), cache, batch_rows=4)
    assert measured["loss"] == pytest.approx(after["eval_loss"], rel=1e-4) and measured["bits_per_byte"] is None
    assert measured["accuracy"] == pytest.approx(after["eval_accuracy"])


def test_the_task_decides_whether_later_tokens_may_be_seen(task: Task, tmp_path: Path) -> None:
    model = load_causal_lm(str(encoder(tmp_path / "student", seed=2)), task=task)
    check_sight(model, task, name="it", vocabulary_size=V)
    with pytest.raises(ModelError, match="sees later tokens"):
        check_sight(model, NEXT_TOKEN, name="it", vocabulary_size=V)
