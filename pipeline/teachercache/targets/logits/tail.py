"""The tail's log-partition at any temperature from a few numbers.

With β = 1/T, F(β) = log Σ exp(β z) over the tokens outside the head (z relative to the largest logit) is smooth and convex,
and F(0) = log(number of such tokens) is known. Six nodes and that one fix a polynomial of degree six that gives every T >= 1
(tests/bench/codec_fidelity.py measures log Z(T)), and the nodes' own temperatures up to rounding. The nodes are coded as
differences from a linear prediction: from the head's logits and the nodes coded before.

The temperatures are such that one exponential serves all nodes: exp(z/4) is exp(z/8) squared, and so on.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

NODES = (1.0, 8 / 7, 4 / 3, 2.0, 4.0, 8.0)  # temperatures
CODED_ORDER = (0, 5, 3, 4, 2, 1)  # indices into NODES: each is predicted from those before it
LEAST = -80.0  # nats below the largest logit: what a tail without any mass counts as
STEP = 0.006  # nats; a node is off by half of it at most

Array = NDArray[Any]


def node_sums(torch: ModuleType, relative_NV: Tensor, head_ids_Nk: Tensor) -> Tensor:
    """log Σ exp(z / T) over tokens outside the head at the nodes' temperatures, [N, 6]; overwrites its argument."""
    eighth_NV = relative_NV.mul_(1 / 8).exp_()
    eighth_NV.scatter_(1, head_ids_Nk, 0.0)
    quarter_NV = eighth_NV.square()
    half_NV = quarter_NV.square()
    sums = [half_NV.sum(-1), quarter_NV.sum(-1), eighth_NV.sum(-1)]  # T = 2, 4, 8
    sums.insert(0, quarter_NV.mul_(half_NV).sum(-1))  # 4/3
    sums.insert(0, eighth_NV.mul_(quarter_NV).sum(-1))  # 8/7
    sums.insert(0, half_NV.square_().sum(-1))  # 1
    nodes_NG: Tensor = torch.stack(sums, dim=-1).log().clamp_min_(LEAST)
    return nodes_NG


def quantise_nodes(nodes_NG: Array, head_logits_Nk: Array, weights_GF: Array) -> Array:
    """Codes of the nodes, int16 [N, 6] in `CODED_ORDER`."""
    return _run(head_logits_Nk, weights_GF, codes_NG=None, nodes_NG=nodes_NG)[0]


def decode_nodes(codes_NG: Array, head_logits_Nk: Array, weights_GF: Array) -> Array:
    """Inverse of `quantise_nodes`, within STEP / 2: float32 [N, 6] in the order of NODES."""
    return _run(head_logits_Nk, weights_GF, codes_NG=codes_NG, nodes_NG=None)[1]


def _run(head_Nk: Array, weights_GF: Array, *, codes_NG: Array | None, nodes_NG: Array | None) -> tuple[Array, Array]:
    """Prediction is closed-loop: from decoded nodes on both sides, so that errors do not add up."""
    features_NF = _features(head_Nk)
    width = features_NF.shape[1]
    predicted_NG = features_NF @ weights_GF[:, :width].T
    shape = (len(head_Nk), len(NODES))
    codes = np.empty(shape, dtype=np.int16) if codes_NG is None else codes_NG
    decoded_NG = np.empty(shape, dtype=np.float32)
    for place, node in enumerate(CODED_ORDER):
        earlier = list(CODED_ORDER[:place])
        predicted_N = predicted_NG[:, place] + decoded_NG[:, earlier] @ weights_GF[place, width : width + place]
        if nodes_NG is not None:
            codes[:, place] = np.clip(np.rint((nodes_NG[:, node] - predicted_N) / STEP), -32768, 32767)
        decoded_NG[:, node] = predicted_N + codes[:, place] * np.float32(STEP)
    return codes, decoded_NG


def fit_node_weights(nodes_NG: Array, head_logits_Nk: Array) -> Array:
    """Least squares on a calibration sample: float32 [6, k + 6], a row for each node in `CODED_ORDER`."""
    features_NF = _features(head_logits_Nk).astype(np.float64)
    width = features_NF.shape[1]
    weights_GF = np.zeros((len(NODES), width + len(NODES)), dtype=np.float32)
    for place, node in enumerate(CODED_ORDER):
        known = np.concatenate([features_NF, nodes_NG[:, list(CODED_ORDER[:place])]], axis=1)
        # A small ridge: with a short sample, or constant logits, features are collinear.
        gram = known.T @ known
        gram[np.diag_indices_from(gram)] += 1e-6 * (np.trace(gram) / len(gram) + 1e-12)
        weights_GF[place, : width + place] = np.linalg.solve(gram, known.T @ nodes_NG[:, node])
    return weights_GF


def _features(head_logits_Nk: Array) -> Array:
    """A constant and the head's logits below the first (which is 0), float32 [N, k]."""
    return np.concatenate([np.ones((len(head_logits_Nk), 1), np.float32), head_logits_Nk[:, 1:]], axis=1)


def tail_at(nodes_NG: Any, temperature: float, *, tail_tokens: int) -> Any:
    """F(1/T), [N], from nodes in the order of NODES. Raises `CacheError` for T < 1, which the nodes do not cover."""
    if temperature < 1:
        raise CacheError(
            f"temperature {temperature:g} is below 1: this cache holds the tail for T from 1 upwards; "
            "use T >= 1 (a floor for a schedule), or a cache of kind top-k with that temperature on its grid"
        )
    weights, at_zero = _interpolation(temperature)
    if tail_tokens == 0:
        return nodes_NG[:, 0]
    total = nodes_NG[:, 0] * weights[0]
    for node in range(1, len(NODES)):
        total = total + nodes_NG[:, node] * weights[node]
    return total + at_zero * float(np.log(tail_tokens))


@lru_cache(maxsize=256)
def _interpolation(temperature: float) -> tuple[tuple[float, ...], float]:
    """Lagrange weights at β = 1/T of the nodes, and of β = 0."""
    points = np.array([*(1 / node for node in NODES), 0.0])
    beta = 1 / temperature
    weights = [
        np.prod([(beta - other) / (point - other) for j, other in enumerate(points) if j != i])
        for i, point in enumerate(points)
    ]
    return tuple(float(weight) for weight in weights[:-1]), float(weights[-1])
