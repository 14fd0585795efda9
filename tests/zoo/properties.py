"""Properties of every architecture. Each property works, or the package refuses it in a line that names the remedy.

A property is a function of a `Subject`; it may return a few words about how it works. `AssertionError` means that the package
accepts what it then does wrongly: the one outcome that must not be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from teachercache.cache import Cache
from teachercache.cache.reader import Split
from teachercache.errors import ModelError, UserError
from teachercache.models.loading import load_tokenizer
from teachercache.targets import HeadSketch
from teachercache.targets.layers.attention import sees
from zoo.architectures import BLOCKS, VOCABULARY, WIDTH
from zoo.subject import (
    DOCUMENTS,
    LONGEST,
    PACKED,
    PER_BATCH,
    SAMPLE,
    Subject,
    log_probabilities,
    with_last_token_changed,
)
from zoo.training import held_out_loss

SPLITS: tuple[Split, ...] = ("train", "held-out")
SAME_LOSS = 1e-4  # nats
ROUNDING = 2e-3  # of the spread of log-probabilities: sums of floats in another order, through recurrences too
SKETCH_KL = 0.01  # nats, at a rank that is the width and a fine step


def assert_close(found: Any, expected: Any, *, unit: float, what: str) -> None:
    """Within rounding."""
    off = float(np.abs(np.asarray(found) - np.asarray(expected)).max()) / unit
    assert off <= ROUNDING, f"{what}: off by {off:.2g} of the spread"


def label_shift(subject: Subject) -> None:
    """The stored log-probabilities of tokens that follow have the mean which transformers calls the loss."""
    for one, item in zip(DOCUMENTS, subject.captured, strict=True):
        assert item.columns is not None
        stored = -float(item.columns["actual_log_prob"].astype(np.float64).mean())
        assert_close(stored, subject.loss(one), unit=subject.spread, what="loss of the next token")


def logits(subject: Subject) -> None:
    """The whole stored distribution is the model's own."""
    for one, item in zip(DOCUMENTS, subject.captured, strict=True):
        assert_close(log_probabilities(item), subject.expected(one), unit=subject.spread, what="log-probabilities")


def padding(subject: Subject) -> None:
    """A row's targets do not depend on the rows beside it, nor on its padding."""
    teacher = subject.teacher()
    together = teacher.capture(DOCUMENTS, positions_per_batch=PER_BATCH)
    for one, item in zip(DOCUMENTS, together, strict=True):
        [alone] = teacher.capture([one], positions_per_batch=PER_BATCH)
        assert_close(log_probabilities(item), log_probabilities(alone), unit=subject.spread, what="a row among others")


def causality(subject: Subject) -> None:
    """No position feels a later token."""
    changed = [with_last_token_changed(one) for one in DOCUMENTS]
    again = subject.teacher().capture(changed, positions_per_batch=PER_BATCH)
    for before, after in zip(subject.captured, again, strict=True):
        assert_close(
            log_probabilities(after), log_probabilities(before), unit=subject.spread, what="before a changed token"
        )


def packed(subject: Subject) -> None:
    """Documents of packed rows do not see each other, several rows in a batch."""
    teacher = subject.teacher(layout="packed")
    for one, item in zip(PACKED, teacher.capture(PACKED, positions_per_batch=PER_BATCH), strict=True):
        assert_close(log_probabilities(item), subject.expected(one), unit=subject.spread, what="a packed document")


def sketch(subject: Subject) -> None:
    """Targets that are rebuilt from the final hidden state are the model's own, at any temperature."""
    kind = HeadSketch(
        k=8, rank=WIDTH, step=0.02, vocabulary_size=VOCABULARY, calibration_positions=len(SAMPLE) * LONGEST
    )
    teacher = subject.teacher(logits=kind)
    teacher.prepare(SAMPLE, positions_per_batch=PER_BATCH, longest=LONGEST)
    made: Any = teacher.kind
    for one, item in zip(DOCUMENTS, teacher.capture(DOCUMENTS, positions_per_batch=PER_BATCH), strict=True):
        arrays = made.decoded({column.name: (item.columns or {})[column.name] for column in made.columns})
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        tensors["head_ids"] = tensors["head_ids"].long()
        expected_NV = torch.from_numpy(subject.expected(one))
        for temperature in (1.0, 2.0, 4.0):
            exact_NV = (expected_NV / temperature).log_softmax(-1)
            stored_NV = made.softened(tensors, temperature, tail="sketch", xp=torch).dense()
            divergence = float((exact_NV.exp() * (exact_NV - stored_NV)).sum(-1).mean())
            assert divergence < SKETCH_KL, f"KL of {divergence:.3g} nats at T = {temperature:g}"


def hidden_states(subject: Subject) -> None:
    """Hidden states that enter and leave the first block are those of the row alone."""
    kinds = subject.layers(hidden={"layers": [0, 1], "codec": "bf16"})
    teacher = subject.teacher(**kinds)
    teacher.prepare(SAMPLE, positions_per_batch=PER_BATCH, longest=LONGEST)
    for one, item in zip(DOCUMENTS, teacher.capture(DOCUMENTS, positions_per_batch=PER_BATCH), strict=True):
        found, expected = teacher.targets.decoded(item.columns or {}), subject.around_first_block(one)
        for layer in (0, 1):
            values_SD = expected[layer]
            off = np.abs(found[f"hidden_{layer}"] - values_SD).max() / np.abs(values_SD).max()
            assert off < 1e-2, f"hidden state {layer}: off by {off:.2g} of the largest"


def attention(subject: Subject) -> str:
    """Maps that training rebuilds are those that transformers returns: by the cheapest kind that this model allows."""
    refusals = []
    for kind in ("relations", "queries-keys", "maps"):
        try:
            _attention(subject, kind)
            return kind
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def _attention(subject: Subject, kind: str) -> None:
    exact = {"step": 0.01, "codec": "int8"}
    asked: dict[str, Any] = {"attention": {"kind": kind, "layers": {"last": 1}}}
    if kind == "relations":
        asked["hidden"] = {"layers": [1], **exact}
    if kind == "queries-keys":
        asked["attention"]["step"] = 0.01
    teacher = subject.teacher(implementation="eager", **subject.layers(**asked))
    teacher.prepare(SAMPLE, positions_per_batch=PER_BATCH, longest=LONGEST)
    for one, item in zip(DOCUMENTS, teacher.capture(DOCUMENTS, positions_per_batch=PER_BATCH), strict=True):
        expected_HSS = subject.last_attention(one)
        found_HSS = _maps(teacher.targets, item.columns or {}, one)
        off = float((found_HSS - expected_HSS).abs().sum(-1).mean())
        assert off < 0.03, f"maps of {kind}: off by {off:.2g} of a query's mass"


def _maps(targets: Any, columns: dict[str, Any], one: Any) -> torch.Tensor:
    """[H, S, S] of the last block, as training rebuilds it."""
    arrays = {
        name: torch.from_numpy(np.ascontiguousarray(values))[None] for name, values in targets.decoded(columns).items()
    }
    segment_BS = torch.from_numpy(one.segment_S())[None]
    positions_BS = torch.from_numpy(one.position_ids_S())[None]
    taught = targets.attention.stored_heads(torch, BLOCKS, arrays, positions_BS)
    seen_BSS = sees(torch, segment_BS, window=taught.window)
    return taught.probabilities(slice(None), seen_BSS, sinks=True)[0]


def beginning(subject: Subject) -> str:
    """Every window of a text and every packed document begins as the family's tokenizer begins a text; that token is no
    target."""
    first = load_tokenizer(str(subject.saved))("a").input_ids[0] if subject.architecture.begins else None
    caches = [subject.cache("documents")]
    with suppress(ModelError):
        caches.append(subject.cache("packed"))
    for folder in caches:
        _check_beginnings(Cache.open(folder), first)
    return "" if first is None else "a token in front"


def _check_beginnings(cache: Cache, first: int | None) -> None:
    rows = [cache.read_row(split, index).row for split in SPLITS for index in range(cache.rows_of(split))]
    windows = Counter(segment.source_id for one in rows for segment in one.segments)
    assert max(windows.values()) > 1, "no text is so long that it takes several windows"
    for one in rows if first is not None else ():
        starts = [segment.start for segment in one.segments]
        assert (one.input_ids_S[starts] == first).all(), "a window begins in the middle of a text, without its token"
        assert first not in one.labels_N(), "the token in front is a target"
        begins_text = [segment.byte_start == 0 for segment in one.segments]
        assert (one.target_mask_S[starts] == begins_text).all(), "only a text's own beginning is predicted from nothing"


def export(subject: Subject) -> None:
    """A few steps under ZeRO 2 from a cache of this teacher; the exported folder, which transformers alone loads, has the
    held-out loss that training measured."""
    run = subject.run()
    before = held_out_loss(subject.student, subject.cache("documents"))
    measured, exported = run["best"]["loss"], held_out_loss(Path(run["student"]), subject.cache("documents"))
    assert abs(exported - measured) < SAME_LOSS, (
        f"held-out loss {exported:.6f} of the export, {measured:.6f} in training"
    )
    assert exported < before - 10 * SAME_LOSS, f"nothing was learned: {before:.4f} before, {exported:.4f} after"


PROPERTIES: dict[str, Callable[[Subject], str | None]] = {
    "label shift": label_shift,
    "logits": logits,
    "padding": padding,
    "causality": causality,
    "packed rows": packed,
    "sketch": sketch,
    "hidden states": hidden_states,
    "attention": attention,
    "beginning": beginning,
    "export": export,
}


@dataclass(frozen=True)
class Outcome:
    """`works`, `refused` or `wrong`; `why` has the refusal's line or what is wrong, else how it works."""

    result: Literal["works", "refused", "wrong"]
    why: str = ""


def examine(subject: Subject, name: str) -> Outcome:
    """One property of one architecture. What is no refusal of the package's is wrong, whatever it is."""
    try:
        return Outcome("works", PROPERTIES[name](subject) or "")
    except UserError as refusal:
        line = str(refusal).replace(str(subject.folder), "FOLDER")
        return Outcome("refused", line) if "\n" not in line else Outcome("wrong", f"more than one line: {line}")
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")
