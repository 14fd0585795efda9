"""Kernels of a GPU give what the CPU gives: the capture's logits, calibration, the training losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective import DistillationObjective
from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.objective.ensemble.fused_tail import FusedTail, Fusion
from teachercache.objective.ensemble.teacher_view import TeacherView
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.objective.logits.projected import projected_sums
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.objective.logits.tail_logits import tensor_cores
from teachercache.targets import HeadSketch, StoredTargets, TopK
from teachercache.targets.logits.boundary_mass import BoundaryMass
from teachercache.targets.logits.softened import SketchTail, Softened
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.forward import Teacher
from teachercache.teacher.output_layer import OutputLayer

from builders import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

V, L, D, N = 300, 320, 32, 64


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, None, True), (1.0, 10.0, False)])
def test_logits_of_half_precision_are_summed_in_float32(
    dtype: torch.dtype, scale: float, softcap: float | None, bias: bool
) -> None:
    matrix_VD, hidden_ND = random(0, V, D).to(dtype), (random(1, N, D) * 3).to(dtype)
    layer = OutputLayer(matrix_VD, random(2, V) if bias else None, scale, softcap)
    expected_NV = layer.logits(hidden_ND)
    found_NV = layer.on("cuda").logits(hidden_ND.cuda())
    assert found_NV.dtype == torch.float32
    torch.testing.assert_close(found_NV.cpu(), expected_NV, atol=2e-4, rtol=1e-4)
    rounded_NV = (hidden_ND @ matrix_VD.T).float()  # what the model prints
    if softcap is None and not bias:
        assert (found_NV.cpu() - expected_NV).abs().max() < 0.01 * (rounded_NV - expected_NV).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_captured_on_a_gpu_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    kind = TopK(16, (1.0, 2.0), "float32", V)
    matrix_VD, hidden_ND = random(0, L, D).to(dtype), (random(1, N, D) * 2).to(dtype)
    layer = OutputLayer(matrix_VD[:V], None, 1.0, None)
    labels_N = torch.arange(N)
    ours = kind.capture(torch, layer.logits(hidden_ND), labels_N)
    theirs = kind.capture(torch, layer.on("cuda").logits(hidden_ND.cuda()), labels_N.cuda())
    for name in ("head_logits", "tail_log_partition", "actual_log_prob"):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-3)
    assert (theirs["head_ids"] == ours["head_ids"]).mean() > 0.99


class NoRoom(OutputLayer):
    """A layer that never fits on a GPU."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        if hidden_ND.is_cuda:
            raise torch.OutOfMemoryError("out of memory")
        return super().logits(hidden_ND)


def test_a_sketch_is_fitted_on_the_cpu_where_the_gpu_has_no_room() -> None:
    kind = HeadSketch(6, 16, 0.1, V, 64)
    model = tiny_model(vocabulary=V)
    teacher = Teacher.of(model, targets=StoredTargets(kind), layout="documents", pad_id=0, device="cuda")
    layer, rows = OutputLayer.of(model, vocabulary_size=V), [random(3, 200, D).cuda()]
    cramped = NoRoom(layer.matrix_VD, layer.bias_V, layer.scale, layer.softcap)
    fitted = teacher._fit(cramped, rows)
    expected = calibrate(kind, layer.on("cpu"), [rows_ND.cpu() for rows_ND in rows])
    assert fitted.basis is not None and expected.basis is not None
    np.testing.assert_allclose(fitted.basis.basis_Vr, expected.basis.basis_Vr, atol=1e-2)


OBJECTIVES = [
    {"divergence": "forward-kl", "tail": "sketch"},
    {"divergence": "forward-kl", "tail": "ghost"},
    {"divergence": "reverse-kl", "tail": "sketch"},
    {"divergence": "jensen-shannon", "tail": "uniform"},
    {"divergence": "total-variation", "tail": "sketch"},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda each: f"{each['divergence']}, {each['tail']}")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projected", [False, True])
def test_losses_on_a_gpu_are_those_of_the_cpu(settings: Any, autocast: torch.dtype | None, projected: bool) -> None:
    model = tiny_model(vocabulary=V)
    layer = OutputLayer.of(model, vocabulary_size=V)
    hidden_ND = random(4, 400, D)
    kind = calibrate(HeadSketch(6, 24, 0.05, V, 64), layer, [hidden_ND])
    captured = kind.capture(torch, layer.logits(hidden_ND[:N]), torch.arange(N), hidden_ND[:N])
    decoded = kind.decoded(kind.finish(captured))
    targets = {name: torch.from_numpy(values) for name, values in decoded.items()}
    targets = {name: values.long() if values.dtype == torch.int32 else values for name, values in targets.items()}
    objective = DistillationObjective(ObjectiveConfig(alpha=0.7, temperature=2.0, **settings), kind=kind)

    def run(device: str) -> list[Tensor]:
        student_BSD = random(5, 2, N // 2, D).to(device).requires_grad_()
        weight_LD = (random(6, L, D) * 0.5).to(device).requires_grad_()
        labels_BS = torch.arange(N).view(2, -1).to(device)
        enabled = autocast is not None and device == "cuda"
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=enabled):
            if projected:
                output = StudentOutput.of_hidden(student_BSD, weight_LD)
            else:
                output = StudentOutput.of_logits(torch.nn.functional.linear(student_BSD, weight_LD))
            terms = objective(output, labels_BS, targets)
        terms.total.backward()
        assert student_BSD.grad is not None and weight_LD.grad is not None
        return [terms.total.detach().float(), student_BSD.grad, weight_LD.grad]

    for found, expected in zip(run("cuda"), run("cpu"), strict=True):
        gap = (found.cpu() - expected).norm() / expected.norm()
        # A sketch is expanded in TF32 (tests/objective/logits/test_tail_logits.py has what that is worth).
        exact = 1e-3 if settings["tail"] == "sketch" else 1e-4
        assert gap < (exact if autocast is None else 3e-2)


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
def test_several_teachers_are_fused_alike(fusion: Fusion) -> None:
    """One everywhere, one at some positions, and one of these in another vocabulary."""
    first_U = torch.arange(200) % 120

    def tail(device: str) -> FusedTail:
        teacher_views = []
        for seed, tokens, step in ((1, V, 1), (2, V, 3), (3, 200, 2)):
            at_n = torch.arange(0, N, step, device=device)
            head_np = random(seed, len(at_n), 9).log_softmax(-1).to(device)
            ids_nk = (torch.arange(8)[None] * 7 + torch.arange(len(at_n))[:, None]).to(device) % tokens
            sketch = SketchTail(*(random(seed + 10 * i, *shape).to(device) for i, shape in
                                  enumerate(((len(at_n), 4), (tokens, 4), (tokens,)), start=1)))  # fmt: skip
            softened = Softened(ids_nk, head_np[:, :8].contiguous(), head_np[:, 8].contiguous(), sketch)
            projection = None
            if tokens != V:
                emitted_V = torch.zeros(V, dtype=torch.bool).index_fill(0, first_U, True)
                projection = VocabularyProjection(first_U, emitted_V).to(torch.device(device))
            teacher_views.append(
                TeacherView.of(softened, at_n if step > 1 else None, positions=N, projection=projection)
            )
        weight_NK = torch.rand(N, 3, generator=torch.Generator().manual_seed(5))
        for number, step in enumerate((1, 3, 2)):
            weight_NK[torch.arange(N) % step > 0, number] = 0
        return FusedTail(teacher_views, (weight_NK / weight_NK.sum(-1, keepdim=True)).to(device), fusion, V)

    parts = [slice(0, N), slice(5, 23)]
    for part in parts:
        found, expected = (tail(device).logits(part, torch).log_softmax(-1).cpu() for device in ("cuda", "cpu"))
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)  # sketches are expanded in TF32


def test_a_block_of_targets_comes_in_one_copy() -> None:
    """Every kind of number that a capture takes, and the boundary mass beside it."""
    layer = OutputLayer.of(tiny_model(vocabulary=V), vocabulary_size=V)
    hidden_ND = random(4, 400, D)
    kind = calibrate(HeadSketch(6, 24, 0.05, V, 64), layer, [hidden_ND])
    targets = StoredTargets(kind, boundary=BoundaryMass.of(np.arange(V) % 3 == 0))
    ours = targets.capture(torch, layer.logits(hidden_ND[:N]), torch.arange(N), hidden_ND[:N])
    on_gpu, labels_N = hidden_ND[:N].cuda(), torch.arange(N, device="cuda")
    theirs = targets.capture(torch, layer.on("cuda").logits(on_gpu), labels_N, on_gpu)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert theirs[name].dtype == values.dtype and theirs[name].shape == values.shape
        if name != "head_ids":
            np.testing.assert_allclose(theirs[name], values, atol=2e-3)


def test_the_loss_in_chunks_never_waits_for_the_gpu() -> None:
    hidden_ND, weight_LD = random(4, N, D).cuda().requires_grad_(), random(6, L, D).cuda().requires_grad_()
    labels_N = torch.arange(N, device="cuda")
    teacher = no_teacher(labels_N, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, *_ = projected_sums(
            hidden_ND, weight_LD, None, labels_N=labels_N, teacher=teacher, weights=Weights(0.0, 1.0), vocabulary_size=V,
            chunk_bytes=4 * L * N // 4,
        )  # fmt: skip
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden_ND.grad is not None and bool(hidden_ND.grad.isfinite().all())


def test_tf32_is_allowed_for_a_while_alone() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with tensor_cores(torch.device("cuda")):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
