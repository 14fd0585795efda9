"""Fidelity while capturing: KL(teacher ‖ stored), measured on 1 % of the positions while their logits are at hand.

A basis fitted to one kind of text drifts on another: the job watches these figures unit by unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teachercache.errors import CacheError
from teachercache.targets import TAIL_POLICIES, TargetKind
from teachercache.targets.logits.tails.policy import is_dense

EVERY = 100  # positions
TEMPERATURES = (1.0, 2.0, 4.0)


class Drift:
    """Sums of KL over sampled positions, at those of the temperatures that the kind holds.

    Kinds without a dense tail policy are not measured: a sample of tokens has infinite KL.
    """

    def __init__(self, kind: TargetKind) -> None:
        self.kind = kind
        self._tail = next((name for name in kind.tail_policies if is_dense(TAIL_POLICIES[name])), None)
        self._temperatures = [T for T in TEMPERATURES if self._tail and _holds(kind, T)]
        self._logits: list[tuple[int, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums = dict.fromkeys(self._temperatures, 0.0)
        self._positions = 0

    def sample(self, start: int, logits_nV: Tensor) -> None:
        """Keep the logits of every hundredth position of a batch; call it before capture overwrites them."""
        if start == 0:  # a new batch: one that ran out of memory may have left some
            self._logits = []
        if not self._temperatures:
            return
        offsets = range(-start % EVERY, len(logits_nV), EVERY)
        vocabulary = self.kind.vocabulary_size
        self._logits += [(start + offset, logits_nV[offset, :vocabulary].clone()) for offset in offsets]

    def measure(self, rows: Sequence[Mapping[str, Any] | None], positions: Sequence[int]) -> None:
        """Compare the kept logits with the finished columns of the batch's rows (None: quarantined)."""
        starts = np.cumsum([0, *positions])
        owners = [int(np.searchsorted(starts, position, side="right")) - 1 for position, _ in self._logits]
        decoded = {index: self._decoded(row) for index in set(owners) if (row := rows[index]) is not None}
        kept = [(*sampled, index) for sampled, index in zip(self._logits, owners, strict=True) if index in decoded]
        self._logits = []
        if not kept:
            return
        here = [(decoded[index], position - int(starts[index])) for position, _, index in kept]
        arrays = {name: np.stack([row[name][at] for row, at in here]) for name in here[0][0]}
        self._add(arrays, torch.stack([logits_V for _, logits_V, _ in kept]))

    def _decoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return self.kind.decoded({column.name: row[column.name] for column in self.kind.columns})

    def _add(self, arrays: Mapping[str, Any], logits_NV: Tensor) -> None:
        """All of a batch at once: what is stored is expanded by one matmul, whose matrix is read once."""
        assert self._tail is not None
        tensors = {name: torch.from_numpy(values).to(logits_NV.device) for name, values in arrays.items()}
        tensors = {name: values.long() if values.dtype == torch.int32 else values for name, values in tensors.items()}
        kl_T = []
        for temperature in self._temperatures:
            stored_NV = self.kind.softened(tensors, temperature, tail=self._tail, xp=torch).dense()
            kl_T.append(kl_divergence(logits_NV / temperature, stored_NV).sum())
        for temperature, kl in zip(self._temperatures, torch.stack(kl_T).tolist(), strict=True):  # one wait for all
            self._sums[temperature] += kl
        self._positions += len(logits_NV)

    def result(self) -> dict[str, Any]:
        """`positions` measured, the `tail` policy, and sums of KL in nats by temperature; empty when nothing was measured."""
        if not self._positions:
            return {}
        kl = {f"{T:g}": total for T, total in self._sums.items()}
        return {"positions": self._positions, "tail": self._tail, "kl": kl}


def kl_divergence(logits_NV: Tensor, log_prob_NV: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ p) in nats, [N], 0 log 0 = 0; summed in float64."""
    exact_NV = torch.log_softmax(logits_NV, dim=-1)
    gap_NV = (exact_NV - log_prob_NV).mul_(exact_NV.exp()).nan_to_num_(0.0, posinf=torch.inf)
    return gap_NV.sum(-1, dtype=torch.float64)


def _holds(kind: TargetKind, temperature: float) -> bool:
    try:
        kind.check_temperature(temperature)
    except CacheError:
        return False
    return True
