"""How faithful is what is stored? KL(teacher ‖ stored), measured on 1 % of the positions while their logits are at hand.

A basis fitted to one kind of text drifts on another: the job watches these figures unit by unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teachercache.errors import CacheError
from teachercache.targets import TailPolicy, TargetKind

EVERY = 100  # positions
DENSE: tuple[TailPolicy, ...] = ("sketch", "uniform")  # policies that give every token its own share
TEMPERATURES = (1.0, 2.0, 4.0)


class Drift:
    """Sums of KL over sampled positions, at those of the temperatures that the kind holds.

    Kinds without a dense tail policy are not measured: a sample of tokens has infinite KL.
    """

    def __init__(self, kind: TargetKind) -> None:
        self.kind = kind
        self._tail = next((policy for policy in kind.tail_policies if policy in DENSE), None)
        self._temperatures = [T for T in TEMPERATURES if self._tail and _holds(kind, T)]
        self._logits: list[tuple[int, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums = dict.fromkeys(self._temperatures, 0.0)
        self._positions = 0

    def sample(self, start: int, logits_nV: Tensor) -> None:
        """Keep the logits of every hundredth position of a batch; call it before capture overwrites them."""
        if not self._temperatures:
            return
        offsets = range(-start % EVERY, len(logits_nV), EVERY)
        vocabulary = self.kind.vocabulary_size
        self._logits += [(start + offset, logits_nV[offset, :vocabulary].clone()) for offset in offsets]

    def measure(self, rows: Sequence[Mapping[str, Any] | None], positions: Sequence[int]) -> None:
        """Compare the kept logits with the finished columns of the batch's rows (None: quarantined)."""
        starts = np.cumsum([0, *positions])
        for position, logits_V in self._logits:
            index = int(np.searchsorted(starts, position, side="right")) - 1
            columns = rows[index]
            if columns is not None:
                self._add(columns, position - int(starts[index]), logits_V)
        self._logits = []

    def _add(self, columns: Mapping[str, Any], position: int, logits_V: Tensor) -> None:
        assert self._tail is not None
        arrays = {name: values[position : position + 1] for name, values in self.kind.decoded(columns).items()}
        tensors = {name: torch.from_numpy(values).to(logits_V.device) for name, values in arrays.items()}
        tensors = {name: values.long() if values.dtype == torch.int32 else values for name, values in tensors.items()}
        for temperature in self._temperatures:
            stored_V = self.kind.softened(tensors, temperature, tail=self._tail, xp=torch).dense()[0]
            self._sums[temperature] += kl_divergence(logits_V / temperature, stored_V)
        self._positions += 1

    def result(self) -> dict[str, Any]:
        """`positions` measured, the `tail` policy, and sums of KL in nats by temperature; empty when nothing was measured."""
        if not self._positions:
            return {}
        kl = {f"{T:g}": total for T, total in self._sums.items()}
        return {"positions": self._positions, "tail": self._tail, "kl": kl}


def kl_divergence(logits_V: Tensor, log_prob_V: Tensor) -> float:
    """KL(softmax(logits) ‖ p) in nats, 0 log 0 = 0."""
    exact_V = torch.log_softmax(logits_V.double(), dim=-1)
    return float((exact_V.exp() * (exact_V - log_prob_V.double())).nan_to_num(0.0, posinf=torch.inf).sum())


def _holds(kind: TargetKind, temperature: float) -> bool:
    try:
        kind.check_temperature(temperature)
    except CacheError:
        return False
    return True
