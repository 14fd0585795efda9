"""Rank and step of a sketch from a target: the cheapest of a few whose KL(teacher ‖ stored) on the sample is within it.

A smaller rank wants a finer step, and either costs bytes. What a position takes is estimated by the entropy of its codes
over the whole sample: directions are coded one by one, so that each has its share whatever the rank. KL is measured on
rows as a reader would get them, at the worst of `TEMPERATURES`, with biases still at zero, which can only raise it. The
directions that it is measured with are fitted to the other rows of the sample: on its own rows a sketch looks better than
it is (SmolLM2-135M, 2,048 positions, rank 144: 0.11 nats there, 0.17 elsewhere).

Less rank never allows a coarser step, and only what is cheaper than the best so far is of interest: of each rank, from the
largest down, the finest step that would still be cheaper is measured, and others only where that one suffices. So about
two measurements a rank are made, not one for each pair.

Shapes: N positions, V vocabulary, D width, r rank, R largest rank, M blocks of a row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.errors import ModelError
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.head_sketch import HeadSketch, quantise_coefficients
from teachercache.teacher.fidelity import kl_divergence
from teachercache.teacher.output_layer import OutputLayer

STEPS = (
    0.5, 0.45, 0.4, 0.36, 0.32, 0.28, 0.25, 0.22, 0.2, 0.18, 0.16, 0.145, 0.13, 0.115, 0.1, 0.09, 0.08, 0.072, 0.064,
    0.057, 0.05, 0.045, 0.04, 0.035, 0.03, 0.025, 0.02,
)  # fmt: skip
RANK_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)  # of the width
TEMPERATURES = (1.0, 2.0)
MEASURED_POSITIONS = 1024  # of the sample, or a quarter of it
BLOCK = 256


def candidate_ranks(kind: HeadSketch, *, width: int, positions: int) -> list[int]:
    """Ranks to choose from, rising: the one that is given, or shares of the width that the sample is large enough for."""
    if "rank" not in kind.chosen:
        return [kind.rank]
    return sorted({max(1, round(share * width)) for share in RANK_SHARES if 2 * share * width <= positions})


@dataclass(frozen=True)
class Tried:
    """A rank and a step, bytes a position of the sketch by entropy, and the KL that they leave, in nats."""

    rank: int
    step: float
    sketch_bytes: float
    kl: float


def held_apart(rows_hidden_ND: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Rows to measure on, and the others; of a single row, that row twice."""
    ends = np.cumsum([len(rows) for rows in rows_hidden_ND])
    count = int(np.searchsorted(ends, min(MEASURED_POSITIONS, ends[-1] // 4))) + 1
    if len(rows_hidden_ND) == 1:
        return rows_hidden_ND, rows_hidden_ND
    count = min(count, len(rows_hidden_ND) - 1)
    return rows_hidden_ND[:count], rows_hidden_ND[count:]


def choose(
    kind: HeadSketch,
    basis: SketchBasis,
    layer: OutputLayer,
    rows_hidden_ND: Sequence[Tensor],
    measured_ND: Sequence[Tensor],
    *,
    ranks: Sequence[int],
) -> dict[str, Any]:
    """`rank` and `step`, what they cost and leave, and what else was tried: the record that the manifest keeps.

    `basis` is of the largest rank, and fitted without the rows that are measured. Raises `ModelError`, with what can be had,
    when no candidate meets `target_kl`.
    """
    assert kind.target_kl is not None
    target, steps = kind.target_kl, STEPS if "step" in kind.chosen else (kind.step,)
    trial = Trial(kind, basis, layer, rows_hidden_ND, measured_ND)
    best: Tried | None = None
    coarsest = 0  # that may do
    for rank in sorted(ranks, reverse=True):
        limit = float("inf") if best is None else best.sketch_bytes
        cheaper = bisect_left(steps, True, key=lambda step, rank=rank: trial.bytes(rank, step) >= limit)
        if cheaper > coarsest and trial(rank, steps[cheaper - 1]).kl <= target:
            coarsest = bisect_left(
                steps, True, coarsest, cheaper - 1, key=lambda step, rank=rank: trial(rank, step).kl <= target
            )
            best = trial(rank, steps[coarsest])
    if best is None:
        left = trial(max(ranks), steps[-1])
        raise ModelError(
            f"targets.logits.target_kl is {target:g}, but even a step of {left.step:g} leaves {left.kl:.3g} nats with "
            f"k = {kind.k} and rank = {left.rank}; raise {'k' if 'rank' in kind.chosen else 'rank or k'}, or the target"
        )
    return {"target_kl": target, **vars(best), "tried": [vars(tried) for tried in trial.all]}


class Trial:
    """Costs and errors of ranks and steps; each pair is measured once."""

    def __init__(
        self,
        kind: HeadSketch,
        basis: SketchBasis,
        layer: OutputLayer,
        rows_hidden_ND: Sequence[Tensor],
        measured_ND: Sequence[Tensor],
    ) -> None:
        self._kind, self._basis, self._layer = kind, basis, layer
        self._coefficients = [
            (rows_ND.float().cpu().numpy() - basis.mean_D) @ basis.analysis_Dr for rows_ND in rows_hidden_ND
        ]
        whole = kind.with_basis(replace(basis, step=STEPS[0]))
        self._measured = [(rows_ND, _captured(whole, layer, rows_ND)) for rows_ND in measured_ND]
        self._known: dict[tuple[int, float], Tried] = {}
        self._entropies = lru_cache(self._entropies_of)

    @property
    def all(self) -> list[Tried]:
        """Everything that was measured, in order."""
        return list(self._known.values())

    def __call__(self, rank: int, step: float) -> Tried:
        if (rank, step) not in self._known:
            self._known[rank, step] = Tried(
                rank, step, round(self.bytes(rank, step), 2), round(self._divergence(rank, step), 6)
            )
        return self._known[rank, step]

    def bytes(self, rank: int, step: float) -> float:
        """Returns the bytes of the sketch for a position: entropies of the first `rank` directions, their means'
        included."""
        return float(self._entropies(step)[:rank].sum()) / 8

    def _entropies_of(self, step: float) -> NDArray[np.float64]:
        """Bits a position of each direction, [R]."""
        coded = [quantise_coefficients(rows_NR, step) for rows_NR in self._coefficients]
        means_MR, codes_NR = (np.concatenate(parts) for parts in zip(*coded, strict=True))
        return _entropy(codes_NR) + _entropy(means_MR) * (len(means_MR) / len(codes_NR))

    def _divergence(self, rank: int, step: float) -> float:
        kind = self._kind.with_basis(replace(self._basis.first(rank), step=step))
        sums, positions = dict.fromkeys(TEMPERATURES, 0.0), 0
        for hidden_ND, captured in self._measured:
            cut = {**captured, "coefficients": captured["coefficients"][:, :rank]}
            tensors = _as_read(kind, cut, hidden_ND.device)
            for temperature in TEMPERATURES:
                stored = kind.softened(tensors, temperature, tail="sketch", xp=torch)
                for start in range(0, len(hidden_ND), BLOCK):
                    part = slice(start, start + BLOCK)
                    logits_NV = self._layer.logits(hidden_ND[part]).div_(temperature)
                    sums[temperature] += float(kl_divergence(logits_NV, stored.dense(part)).sum())
            positions += len(hidden_ND)
        return max(sums.values()) / positions


def _captured(kind: HeadSketch, layer: OutputLayer, hidden_ND: Tensor) -> dict[str, NDArray[Any]]:
    parts = []
    for part_ND in hidden_ND.split(BLOCK):
        nothing_N = torch.zeros(len(part_ND), dtype=torch.int64, device=part_ND.device)
        parts.append(kind.capture(torch, layer.logits(part_ND), nothing_N, part_ND))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _as_read(kind: HeadSketch, captured: dict[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Decodes a captured row as a reader gets it, as tensors."""
    decoded = kind.decoded(kind.finish(captured))
    tensors = {name: torch.from_numpy(values).to(device) for name, values in decoded.items()}
    return {**tensors, "head_ids": tensors["head_ids"].long()}


def _entropy(codes_NR: NDArray[np.int16]) -> NDArray[np.float64]:
    """Bits of an element of each column, [R]."""
    bits = []
    for column_N in np.ascontiguousarray(codes_NR.T).astype(np.int64):
        counts = np.bincount(column_N - column_N.min())
        shares = counts[counts > 0] / len(column_N)
        bits.append(-(shares * np.log2(shares)).sum())
    return np.array(bits)
