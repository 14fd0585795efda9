"""Parts that the tests of target kinds share: logits, stored arrays as a reader sees them, and a walk through a whole cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from teachercache.cache import Cache
from teachercache.cache.inspection import describe_row
from teachercache.cache.verify import verify
from teachercache.config import ObjectiveConfig
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.targets import TargetKind

from builders import sentences, tiny_cache


def random_logits(positions: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def stored_columns(kind: TargetKind, logits_NV: torch.Tensor, **given: Any) -> dict[str, np.ndarray]:
    """Captured in two blocks, finished as one row, encoded and decoded again."""
    labels_N = torch.arange(len(logits_NV)) % kind.vocabulary_size
    half = len(logits_NV) // 2
    parts = [
        kind.capture(torch, logits_NV[part].clone(), labels_N[part], **{name: v[part] for name, v in given.items()})
        for part in (slice(0, half), slice(half, None))
    ]
    captured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert kind.is_usable(captured).all()
    finished = kind.finish(captured)
    assert set(finished) == {column.name for column in kind.columns}
    read = {}
    for column in kind.columns:
        tables, (page,) = column.encode([finished[column.name]])
        again = type(column).from_metadata(column.name, column.to_metadata())
        read[column.name] = again.decoder(tables)(page, len(logits_NV))
        np.testing.assert_array_equal(read[column.name], finished[column.name])
    return read


def stored_arrays(kind: TargetKind, logits_NV: torch.Tensor, **given: Any) -> dict[str, np.ndarray]:
    return kind.decoded(stored_columns(kind, logits_NV, **given))


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}
    return {name: values.long() if values.dtype == torch.int32 else values for name, values in tensors.items()}


def log_softmax(logits_NV: torch.Tensor, temperature: float) -> np.ndarray:
    return torch.log_softmax(logits_NV.double() / temperature, -1).numpy()


def walk_through_a_cache(folder: Path, settings: dict[str, Any], **objective: Any) -> tuple[Cache, torch.Tensor]:
    """Precompute, verify, inspect a row, and take one loss with its gradient; returns the cache and the loss."""
    path = tiny_cache(folder, texts=sentences(40), targets={"logits": settings})
    assert verify(path) == []
    cache = Cache.open(path)
    described = describe_row(cache, "train:0", top=3)
    targets = [token["target"] for token in described["tokens"] if token["target"]]
    assert targets and all(1 <= len(target["top"]) <= 3 for target in targets)
    loss = DistillationObjective(ObjectiveConfig(alpha=1.0, **objective), kind=cache.kind)
    rows = [cache.read_row("train", index, columns=loss.columns) for index in range(3)]
    batch = Collator.of(OwnRows(cache, loss.columns))(rows)
    assert Collator.of(OwnRows(cache, loss.columns))([])["targets"].keys() == batch["targets"].keys()
    B, S = batch["shift_labels"].shape
    logits = torch.zeros(B, S, cache.kind.vocabulary_size, requires_grad=True)
    terms = loss(StudentOutput.of_logits(logits), batch["shift_labels"], batch["targets"])
    terms.total.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and torch.isfinite(terms.total)
    return cache, terms.divergence / terms.positions
