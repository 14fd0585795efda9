"""`Softened`: a teacher's next-token distribution at one temperature, however a cache stores it.

Every target kind is read through it: `kind.softened(columns, T)`. A head of single tokens carries its own
log-probabilities; all other tokens share the tail's mass, and the *tail policy* (tails/) says how.

Shapes: N positions, k tokens of the head, V tokens of the vocabulary, r sketch directions, C positions of a block.
Arrays are numpy's or torch's; log-probabilities in nats.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import numpy as np


class Tail(Protocol):
    """The shape of a tail. `temperature` and biases are already inside."""

    def logits(self, part: slice, xp: ModuleType) -> Any:
        """Unnormalised log-probabilities of all V tokens at some of the positions, [C, V], the caller's to overwrite.

        Entries of the head are there and mean nothing.
        """

    def at(self, part: slice) -> Tail:
        """The tail of some of the positions."""


@dataclass(frozen=True, eq=False)
class UniformTail:
    """All tokens outside the head alike."""

    vocabulary_size: int
    like: Any  # an array of the wanted type and device, [N, …]

    def logits(self, part: slice, xp: ModuleType) -> Any:
        """Zeros, [C, V]."""
        positions = len(self.like[part])
        if xp is np:
            return np.zeros((positions, self.vocabulary_size), dtype=self.like.dtype)
        return self.like.new_zeros(positions, self.vocabulary_size)

    def at(self, part: slice) -> UniformTail:
        """The tail of some of the positions."""
        return replace(self, like=self.like[part])


@dataclass(frozen=True, eq=False)
class SketchTail:
    """Logits rebuilt from r coefficients: `cap(basis · c + base) / T + bias(T)`.

    For models without a soft cap base and bias(T) are one vector, and `1/T` is already in the coefficients.
    """

    coefficients_Nr: Any
    basis_Vr: Any
    offset_V: Any
    softcap: float | None = None
    temperature: float = 1.0
    bias_V: Any = None  # added after the soft cap; None without one

    def logits(self, part: slice, xp: ModuleType) -> Any:
        """One matmul and an addition, [C, V]."""
        logits_CV = self.coefficients_Nr[part] @ self.basis_Vr.T
        logits_CV += self.offset_V
        if self.softcap is not None:
            logits_CV = xp.tanh(logits_CV / self.softcap) * (self.softcap / self.temperature) + self.bias_V
        return logits_CV

    def at(self, part: slice) -> SketchTail:
        """The tail of some of the positions."""
        return replace(self, coefficients_Nr=self.coefficients_Nr[part])


@dataclass(frozen=True, eq=False)
class Softened:
    """Probabilities of N positions at one temperature. Σ exp(head) + exp(tail) = 1; -inf stands for no mass.

    `tail` is None under the policies `ghost` and `renormalise`. The ids of a position are distinct; one with fewer than
    k tokens is filled up with *padding*: its first id again, with log-probability -inf.
    """

    head_ids_Nk: Any
    head_log_prob_Nk: Any
    tail_log_prob_N: Any
    tail: Tail | None = None

    def __len__(self) -> int:
        return len(self.tail_log_prob_N)

    def at(self, part: slice) -> Softened:
        """Some of the positions."""
        tail = None if self.tail is None else self.tail.at(part)
        return Softened(self.head_ids_Nk[part], self.head_log_prob_Nk[part], self.tail_log_prob_N[part], tail)

    def topk(self, k: int) -> tuple[Any, Any]:
        """The teacher's top-k temperature-softened probabilities: ids [N, k] and probabilities [N, k], largest first.

        Probabilities are of the whole distribution, not scaled to one. Beyond the head they come from `dense`; raises
        `ValueError` where that is a bucket.
        """
        if k > self.head_ids_Nk.shape[1]:
            if self.tail is not None:
                return _largest(self.dense(), k)
            raise ValueError(f"the head holds {self.head_ids_Nk.shape[1]} tokens, {k} were asked for")
        order_Nk, probabilities_Nk = _largest(self.head_log_prob_Nk, k)
        if isinstance(order_Nk, np.ndarray):
            return np.take_along_axis(self.head_ids_Nk, order_Nk, 1), probabilities_Nk
        return self.head_ids_Nk.gather(1, order_Nk), probabilities_Nk

    def renormalised(self) -> Softened:
        """The head alone, scaled to mass one."""
        log_prob_Nk = self.head_log_prob_Nk - _logsumexp(self.head_log_prob_Nk)
        nothing_N = _module(self.tail_log_prob_N).full_like(self.tail_log_prob_N, -math.inf)
        return Softened(self.head_ids_Nk, log_prob_Nk, nothing_N)

    def with_tail(self, tail: Tail | None) -> Softened:
        """The same masses, the tail spread otherwise."""
        return replace(self, tail=tail)

    def dense(self, part: slice = slice(None)) -> Any:
        """Log-probabilities of every token at some of the positions, [C, V]. Memory is that of the result.

        Raises `ValueError` under `ghost`, which does not say how the tail is spread.
        """
        if self.tail is None:
            raise ValueError("this distribution keeps its tail as one bucket; choose the tail policy uniform or sketch")
        xp = _module(self.head_log_prob_Nk)
        ids_Ck = self.head_ids_Nk[part]
        log_prob_CV = self.tail.logits(part, xp)
        _rule_out(log_prob_CV, ids_Ck)
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty tail's shares, all of which are overwritten
            log_prob_CV += (self.tail_log_prob_N[part, None]) - _logsumexp(log_prob_CV)
        put_head(log_prob_CV, ids_Ck, self.head_log_prob_Nk[part])
        return log_prob_CV


def _module(array: Any) -> Any:
    """numpy, or torch if that is whose array it is: a reader of caches never imports torch itself."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def _logsumexp(values_NV: Any) -> Any:
    """log Σ exp along the last axis, kept, [N, 1]."""
    if not isinstance(values_NV, np.ndarray):
        return values_NV.logsumexp(-1, keepdim=True)
    largest_N1 = np.maximum(values_NV.max(-1, keepdims=True), np.finfo(values_NV.dtype).min)
    return largest_N1 + np.log(np.exp(values_NV - largest_N1).sum(-1, keepdims=True))


def _largest(log_prob_NA: Any, k: int) -> tuple[Any, Any]:
    """Indices of the k largest, largest first, and their probabilities."""
    if isinstance(log_prob_NA, np.ndarray):
        among_Nk = np.argpartition(-log_prob_NA, k - 1, axis=-1)[:, :k]
        within_Nk = np.argsort(-np.take_along_axis(log_prob_NA, among_Nk, 1), axis=-1, kind="stable")
        order_Nk = np.take_along_axis(among_Nk, within_Nk, 1)
        return order_Nk, np.exp(np.take_along_axis(log_prob_NA, order_Nk, 1))
    largest_Nk, order_Nk = log_prob_NA.topk(k, dim=-1)
    return order_Nk, largest_Nk.exp()


def put_head(array_NV: Any, ids_Nk: Any, log_prob_Nk: Any) -> None:
    """Write the head's log-probabilities to their tokens, in place; padding writes nothing."""
    if isinstance(array_NV, np.ndarray):  # the last of equal indices wins: the first of the head, not its padding
        np.put_along_axis(array_NV, ids_Nk[:, ::-1].astype(np.int64), log_prob_Nk[:, ::-1], axis=1)
    else:
        array_NV.scatter_reduce_(1, ids_Nk, log_prob_Nk.to(array_NV.dtype), "amax", include_self=False)


def _rule_out(array_NV: Any, ids_Nk: Any) -> None:
    if isinstance(array_NV, np.ndarray):
        np.put_along_axis(array_NV, ids_Nk.astype(np.int64), -math.inf, axis=1)
    else:
        array_NV.scatter_(1, ids_Nk, -math.inf)
