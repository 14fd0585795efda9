"""Calibration: a basis from the teacher's hidden states on a sample of the corpus.

Of a sketch everything follows from the sample, in a fixed order: each token's mean probability outside the head, ranks of
frequency, weights that predict the tail's nodes, mean and covariance of h, directions that serve tokens by that
probability, and biases that make it right after quantisation.

Shapes: N positions, V vocabulary, D width, r rank, k head, G nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teachercache.errors import ModelError
from teachercache.targets import CalibratedKind
from teachercache.targets.coding.grouped_topk import largest
from teachercache.targets.logits.basis import BIAS_TEMPERATURES, SketchBasis
from teachercache.targets.logits.final_hidden import FinalHidden
from teachercache.targets.logits.head_sketch import HeadSketch, quantise_coefficients, restore_coefficients
from teachercache.targets.logits.tail import fit_node_weights, node_sums
from teachercache.teacher.output_layer import OutputLayer
from teachercache.teacher.sketch_choice import candidate_ranks, choose, held_apart

TEMPERATURES = (4.0, 2.0, 1.0)  # of which each has an exponential that is the square of the one before
BIAS_ITERATIONS = 2
BIAS_CURVE = 1 / sum(1 / temperature for temperature in BIAS_TEMPERATURES)  # by which the line is one in 1/T²
LARGEST_BIAS = 3.0
LEAST_MASS = 2e-7  # added to mean probabilities: a token seldom outside the head has no bias to speak of
FINEST_WITH_HALF = 1 / 256  # step of kind hidden down to which its rounding outweighs float16's by ten
BLOCK = 256


@torch.inference_mode()
def calibrate(kind: CalibratedKind, layer: OutputLayer, rows_hidden_ND: Sequence[Tensor]) -> CalibratedKind:
    """The kind with its basis, from h at the positions of each sampled row, [N, D]. Raises `ModelError`.

    A subclass of a kind is calibrated as that is, unless it has a line of its own in `CALIBRATIONS`.
    """
    for ancestor in type(kind).__mro__:
        if ancestor in CALIBRATIONS:
            return CALIBRATIONS[ancestor](kind, layer, rows_hidden_ND)
    raise ModelError(
        f"targets of kind {kind.kind} are read by a basis, and nothing is known that fits it: add {type(kind).__name__} to "
        "CALIBRATIONS of teachercache.teacher.calibration, or set needs_calibration to False"
    )


def keep_output_layer(kind: FinalHidden, layer: OutputLayer, rows_hidden_ND: Sequence[Tensor]) -> FinalHidden:
    """The kind with the teacher's output matrix, in units of each channel's spread in the sample.

    Raises `ModelError` when the layer has another width than the settings say.
    """
    width = layer.weight_VD.shape[1]
    if kind.width != width:
        raise ModelError(
            f"targets.logits.width is {kind.width}, but the teacher's output layer is {width} wide; set it to {width}"
        )
    hidden_ND = torch.cat([rows.float() for rows in rows_hidden_ND])
    mean_D, spread_D = hidden_ND.mean(0), hidden_ND.std(0, correction=0)
    # A power of two moves no bit of the matrix. A channel that never varies keeps its unit.
    unit_D = torch.where(spread_D > 0, spread_D, 1.0).log2().round().exp2()
    basis_VD = layer.weight_VD * unit_D
    fits_half = kind.step >= FINEST_WITH_HALF and float(basis_VD.abs().max()) < torch.finfo(torch.float16).max
    nothing_V = np.zeros(len(basis_VD), dtype=np.float16)
    basis = SketchBasis(
        mean_D=mean_D.cpu().numpy(),
        analysis_Dr=(1 / unit_D).cpu().numpy(),
        basis_Vr=_half(basis_VD) if fits_half else basis_VD.cpu().numpy(),
        base_V=_base(layer, mean_D).cpu().numpy(),
        bias_constant_V=nothing_V,
        bias_slope_V=nothing_V,
        token_of_rank_V=np.zeros(0, dtype=np.uint32),
        tail_weights_GF=np.zeros((0, 0), dtype=np.float32),
        softcap=layer.softcap,
    )
    return kind.with_basis(basis)


def fit_sketch(kind: HeadSketch, layer: OutputLayer, rows_hidden_ND: Sequence[Tensor]) -> HeadSketch:
    """The kind with a basis fitted to the sample; with `target_kl`, of the rank and step that sketch_choice.py finds.

    Raises `ModelError` when the sample holds fewer than two positions for each direction, and for a target that cannot be met.
    """
    hidden_ND = torch.cat([rows.float() for rows in rows_hidden_ND])
    measured_ND, others_ND = held_apart(rows_hidden_ND)
    fitted_ND = hidden_ND if kind.target_kl is None else torch.cat([rows.float() for rows in others_ND])
    ranks = _possible_ranks(kind, width=layer.weight_VD.shape[1], positions=len(fitted_ND))
    sample = _Sample(kind, layer, hidden_ND)
    sample_arrays: dict[str, Any] = {
        "token_of_rank_V": sample.token_of_rank_V,
        "tail_weights_GF": sample.tail_weights_GF,
    }
    rank, choice = max(ranks), dict[str, Any]()
    if kind.target_kl is not None:
        trial = replace(_directions(layer, fitted_ND, sample.weights_V, rank=rank), **sample_arrays)
        chosen = choose(kind, trial, layer, rows_hidden_ND, measured_ND, ranks=ranks)
        rank, choice = chosen["rank"], {"step": chosen["step"], "chosen": chosen}
    basis = replace(_directions(layer, hidden_ND, sample.weights_V, rank=rank), **sample_arrays, **choice)
    kind = kind.with_basis(basis)
    coefficients_Nr = _quantised(kind, basis, rows_hidden_ND).to(hidden_ND.device)
    constant_V, slope_V = _biases(basis, sample, coefficients_Nr)
    biases: dict[str, Any] = {"bias_constant_V": _half(constant_V), "bias_slope_V": _half(slope_V)}
    return kind.with_basis(replace(basis, **biases, bias_curve=BIAS_CURVE))


def _possible_ranks(kind: HeadSketch, *, width: int, positions: int) -> list[int]:
    if kind.rank > width:
        raise ModelError(
            f"targets.logits.rank is {kind.rank}, but the teacher's output layer is {width} wide; use rank <= {width}"
        )
    ranks = candidate_ranks(kind, width=width, positions=positions)
    if not ranks or positions < 2 * ranks[0]:
        least = ranks[0] if ranks else 1
        raise ModelError(
            f"a sketch of rank {least} needs a calibration sample of {2 * least} positions, the corpus gives "
            f"{positions}; lower targets.logits.rank, or use kind: top-k for a corpus this small"
        )
    return ranks


def _directions(layer: OutputLayer, hidden_ND: Tensor, weights_V: Tensor, *, rank: int) -> SketchBasis:
    """Singular vectors of W_c·Σ^½, its rows weighted by `weights_V` (they sum to 1), in float64."""
    mean_D = hidden_ND.mean(0)
    centred_ND = (hidden_ND - mean_D).double()
    covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
    weight_VD = layer.weight_VD
    # A nonlinear g sees the constant that softmax does not: keep each position's mean logit.
    if layer.softcap is None:
        weight_VD = weight_VD - weights_V @ weight_VD
    size = covariance_DD.diagonal().mean()
    root_DD = torch.linalg.cholesky(covariance_DD + 1e-4 * size * torch.eye(len(covariance_DD), device=size.device))
    gram_DD = root_DD.T @ _gram(weight_VD, weights_V) @ root_DD
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    values_r = values_D.flip(0)[:rank].clamp_min(1e-12)
    vectors_Dr = vectors_DD.flip(1)[:, :rank]
    largest_r = vectors_Dr.gather(0, vectors_Dr.abs().argmax(0, keepdim=True))
    vectors_Dr = vectors_Dr * largest_r.sign()  # an eigenvector's sign is arbitrary: fix it
    unit_r = values_r.sqrt()
    analysis_Dr = torch.linalg.solve_triangular(root_DD.T, vectors_Dr, upper=True) * unit_r
    basis_Vr = weight_VD @ (root_DD @ vectors_Dr / unit_r).float()
    base_V = _base(layer, mean_D)
    if layer.softcap is None:
        base_V = base_V - base_V.mean()
    nothing_V = np.zeros(len(weight_VD), dtype=np.float16)
    return SketchBasis(
        mean_D=mean_D.cpu().numpy(),
        analysis_Dr=analysis_Dr.float().cpu().numpy(),
        basis_Vr=_half(basis_Vr),
        base_V=base_V.cpu().numpy(),
        bias_constant_V=nothing_V,
        bias_slope_V=nothing_V,
        token_of_rank_V=np.arange(len(weight_VD), dtype=np.uint32),
        tail_weights_GF=np.zeros((0, 0), dtype=np.float32),
        softcap=layer.softcap,
    )


def _base(layer: OutputLayer, mean_D: Tensor) -> Tensor:
    base_V = layer.weight_VD @ mean_D
    return base_V if layer.bias_V is None else base_V + layer.bias_V


def _gram(weight_VD: Tensor, weights_V: Tensor) -> Tensor:
    """Wᵀ·diag(weights)·W in float64, without a float64 copy of W."""
    gram_DD = torch.zeros(weight_VD.shape[1], weight_VD.shape[1], dtype=torch.float64, device=weight_VD.device)
    for part_VD, part_V in zip(weight_VD.split(8192), weights_V.split(8192), strict=True):
        gram_DD += (part_VD.double() * part_V.double()[:, None]).T @ part_VD.double()
    return gram_DD


class _Sample:
    """One pass over the sample's logits: heads, nodes, and the mean mass of each token outside the head."""

    def __init__(self, kind: HeadSketch, layer: OutputLayer, hidden_ND: Tensor) -> None:
        vocabulary = kind.vocabulary_size
        in_head_V = torch.zeros(vocabulary, dtype=torch.int64, device=hidden_ND.device)
        self.outside_V = {T: torch.zeros(vocabulary, device=hidden_ND.device) for T in TEMPERATURES}
        heads, ids, nodes, masses = [], [], [], []
        for part_ND in hidden_ND.split(BLOCK):
            logits_NV = layer.logits(part_ND)
            head_Nk, ids_Nk = largest(torch, logits_NV, kind.k)
            in_head_V += torch.bincount(ids_Nk.flatten(), minlength=vocabulary)
            masses.append(self._add_outside(logits_NV, head_Nk, ids_Nk))
            heads.append(head_Nk - head_Nk[:, :1])
            nodes.append(node_sums(torch, logits_NV.sub_(head_Nk[:, :1]), ids_Nk))
            ids.append(ids_Nk)
        self.ids_Nk, self.mass_TN = torch.cat(ids), torch.cat(masses, dim=1)
        # Equally frequent tokens in the order of their ids: the order never depends on a sort's whim.
        order_V = torch.argsort(in_head_V, descending=True, stable=True)
        self.token_of_rank_V = order_V.cpu().numpy().astype(np.uint32)
        self.tail_weights_GF = fit_node_weights(torch.cat(nodes).cpu().numpy(), torch.cat(heads).cpu().numpy())

    def _add_outside(self, logits_NV: Tensor, head_Nk: Tensor, ids_Nk: Tensor) -> Tensor:
        """Add each token's probability outside the head to the sums; their mass at `BIAS_TEMPERATURES`, [2, N]."""
        mass_N = {}
        scaled_NV = ((logits_NV - head_Nk[:, :1]) / TEMPERATURES[0]).exp_()
        for temperature in TEMPERATURES:
            head_N = ((head_Nk - head_Nk[:, :1]) / temperature).exp().sum(-1)
            outside_N = scaled_NV.scatter_(1, ids_Nk, 0.0).sum(-1)
            self.outside_V[temperature] += (1 / (head_N + outside_N)) @ scaled_NV
            mass_N[temperature] = outside_N / (head_N + outside_N)
            scaled_NV.square_()
        return torch.stack([mass_N[temperature] for temperature in BIAS_TEMPERATURES])

    @property
    def weights_V(self) -> Tensor:
        """Costs of an error of each token's logit, [V], summing to 1: its mean probability outside the head.

        T²·KL, the loss, is half of E Σ p·ε² for small errors ε of the logits. All temperatures count alike.
        """
        mass_V = sum(self.outside_V.values(), torch.full_like(self.outside_V[1.0], LEAST_MASS * len(self.ids_Nk)))
        return mass_V / mass_V.sum()


def _quantised(kind: HeadSketch, basis: SketchBasis, rows_hidden_ND: Sequence[Tensor]) -> Tensor:
    """Coefficients of the sample as a reader will see them, [N, r]."""
    rows = []
    for hidden_ND in rows_hidden_ND:
        coefficients_Nr = (hidden_ND.float().cpu().numpy() - basis.mean_D) @ basis.analysis_Dr
        rows.append(restore_coefficients(*quantise_coefficients(coefficients_Nr, kind.step), kind.step))
    return torch.from_numpy(np.concatenate(rows))


def _biases(basis: SketchBasis, sample: _Sample, coefficients_Nr: Tensor) -> tuple[Tensor, Tensor]:
    """constant + slope / T through the biases fitted at two temperatures, [V] each."""
    device = coefficients_Nr.device
    basis_Vr = torch.from_numpy(basis.basis_Vr).to(device, torch.float32)
    base_V = torch.from_numpy(basis.base_V).to(device)

    def sketched(temperature: float) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(coefficients_Nr), BLOCK):
            part = slice(start, start + BLOCK)
            logits_NV = coefficients_Nr[part] @ basis_Vr.T + base_V
            if basis.softcap is not None:
                logits_NV = torch.tanh(logits_NV / basis.softcap) * basis.softcap
            yield part, logits_NV / temperature

    fitted = [
        _fit_bias(partial(sketched, temperature), sample.ids_Nk, mass_N, sample.outside_V[temperature])
        for temperature, mass_N in zip(BIAS_TEMPERATURES, sample.mass_TN, strict=True)
    ]
    (low, high), (low_V, high_V) = BIAS_TEMPERATURES, fitted
    slope_V = (low_V - high_V) / (1 / low - 1 / high)
    return low_V - slope_V / low, slope_V


def _fit_bias(
    sketched: Callable[[], Iterator[tuple[slice, Tensor]]], ids_Nk: Tensor, mass_N: Tensor, outside_V: Tensor
) -> Tensor:
    """Iterative scaling: each token's summed probability outside the head becomes what it is for the teacher."""
    bias_V = torch.zeros_like(outside_V)
    floor = LEAST_MASS * len(mass_N)
    for _ in range(BIAS_ITERATIONS):
        sketched_V = torch.zeros_like(outside_V)
        for part, logits_NV in sketched():
            logits_NV.add_(bias_V).scatter_(1, ids_Nk[part], -torch.inf)
            sketched_V += torch.softmax(logits_NV, dim=-1).T @ mass_N[part]
        bias_V += torch.log((outside_V + floor) / (sketched_V + floor)).clamp_(-LARGEST_BIAS, LARGEST_BIAS)
    return bias_V


def _half(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float16)


# How a kind that calibrates is given its basis: a line here for each; code outside the package adds its own.
CALIBRATIONS: dict[type, Callable[[Any, OutputLayer, Sequence[Tensor]], CalibratedKind]] = {
    FinalHidden: keep_output_layer,
    HeadSketch: fit_sketch,
}
