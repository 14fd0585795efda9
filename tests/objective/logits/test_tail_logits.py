"""A sketch's expansion in the precision that a GPU's tensor cores have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teachercache.objective.logits.divergences import forward_kl
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.tail_logits import tensor_cores
from teachercache.targets.logits.softened import SketchTail, Softened

N, V, R, K = 64, 2000, 192, 12


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(values: Tensor) -> Tensor:
    """To TF32: 10 bits of the mantissa, to nearest."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def softened(coefficients_Nr: Tensor, basis_Vr: Tensor) -> Softened:
    """As calibration makes them: the leading directions move logits by several units, the last ones by a tenth."""
    log_prob_Nk1 = torch.log_softmax(random(3, N, K + 1), -1)
    ids_Nk = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(n))[:K] for n in range(N)])
    tail = SketchTail(coefficients_Nr, basis_Vr, random(4, V) * 2)
    return Softened(ids_Nk, log_prob_Nk1[:, :K].contiguous(), log_prob_Nk1[:, K].contiguous(), tail)


def test_tf32_is_far_below_what_a_sketch_leaves() -> None:
    """Tail logits off by thousandths (the sketch itself is off by tenths), the loss by 1e-5, its gradient by 1e-4."""
    spread_r = 4.0 / torch.arange(1, R + 1) ** 0.7
    coefficients_Nr, basis_Vr = random(1, N, R) * spread_r, random(2, V, R)
    exact, coarse = softened(coefficients_Nr, basis_Vr), softened(rounded(coefficients_Nr), rounded(basis_Vr))
    assert exact.tail is not None and coarse.tail is not None
    logits_NV = exact.tail.logits(slice(0, N), torch)
    error_NV = coarse.tail.logits(slice(0, N), torch) - logits_NV
    assert logits_NV.std() > 4 and error_NV.square().mean().sqrt() < 3e-3 and error_NV.abs().max() < 5e-2

    def gradient(teacher: Softened) -> tuple[float, Tensor]:
        student_NV = (random(5, N, V) * 2).requires_grad_()
        total, *_ = distillation_sums(
            student_NV[None], positions_N=torch.arange(N), labels_N=torch.arange(N), teacher=teacher,
            weights=Weights(1.0, 1.0), vocabulary_size=V, divergence=forward_kl,
        )  # fmt: skip
        total.backward()
        assert student_NV.grad is not None
        return float(total.detach()), student_NV.grad

    (value, found), (expected, wanted) = gradient(coarse), gradient(exact)
    assert value == pytest.approx(expected, rel=1e-4)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    assert not torch.equal(found, wanted)


def test_the_precision_of_matmuls_is_left_as_it_was() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before, common = matmul.fp32_precision, torch.get_float32_matmul_precision()
    with tensor_cores(torch.device("cpu")):
        assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError, match="stopped"), tensor_cores(torch.device("cuda")):
        assert matmul.fp32_precision == "tf32"
        raise RuntimeError("stopped")
    assert matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == common == "highest"


def test_precision_may_have_been_set_by_either_of_torchs_ways() -> None:
    backends: Any = torch.backends
    before = backends.fp32_precision
    backends.fp32_precision = "tf32"  # as TrainingArguments(tf32=True) does; the older way can no longer be asked
    try:
        with tensor_cores(torch.device("cuda")):
            assert backends.cuda.matmul.fp32_precision == "tf32"
        assert backends.fp32_precision == "tf32"
    finally:
        backends.fp32_precision = before
