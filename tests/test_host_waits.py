"""Waits of the host for the device in a micro-batch of training and in a block of a capture, counted without a GPU."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.models.loading import load_causal_lm
from teachercache.objective import NO_TARGET, DistillationObjective
from teachercache.objective.logits.divergences import forward_kl
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.objective.logits.projected import projected_sums
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets import HeadSketch, HiddenStates, StoredTargets, TopK
from teachercache.targets.coding.counter_rng import position_seeds
from teachercache.targets.coding.transfer import to_host, unpacked
from teachercache.targets.logits.boundary_mass import BoundaryMass
from teachercache.targets.logits.final_hidden import FinalHidden
from teachercache.targets.logits.full import Full
from teachercache.targets.logits.random_sampling import RandomSampling
from teachercache.targets.logits.top_p import TopP
from teachercache.teacher import Teacher
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.output_layer import OutputLayer
from teachercache.tokens.rows import Segment, TokenRow
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import tiny_cache, tiny_model, tiny_student
from host_waits import HostWaits
from target_kinds import as_tensors

V, D, N = 300, 32, 60


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sketch() -> HeadSketch:
    layer = OutputLayer.of(tiny_model(vocabulary=V), vocabulary_size=V)
    return calibrate(HeadSketch(6, 24, 0.05, V, 64), layer, [random(4, 400, D)])


def test_what_waits_is_counted() -> None:
    values = random(0, 4)
    with HostWaits() as waits:
        values.cpu(), values.to("cpu"), values.tolist(), float(values[0]), bool(values[0] > 0)
        values.nonzero(), values[values > 0], torch.where(values > 0), values.numpy()
        values[values > 0] = 0.0
    assert waits.total == 10, waits.counts
    with HostWaits() as waits:
        values.add(1)[torch.tensor([0, 2])], torch.where(values > 0, values, 0.0), len(values), values.to(torch.float64)
    assert waits.total == 0, waits.counts


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_loss_in_chunks_never_waits(chunks: int) -> None:
    """However many there are: their positions are consecutive."""
    hidden_ND, weight_LD = random(1, N, D).requires_grad_(), random(2, V + 20, D).requires_grad_()
    labels_N = torch.arange(N)
    with HostWaits() as waits:
        total, *_ = projected_sums(
            hidden_ND, weight_LD, None, labels_N=labels_N, teacher=no_teacher(labels_N, torch.float32),
            weights=Weights(0.0, 1.0), vocabulary_size=V, chunk_bytes=4 * (V + 20) * (N // chunks),
        )  # fmt: skip
        total.backward()
    assert waits.total == 0, waits.counts


@pytest.mark.parametrize("projected", [True, False])
def test_a_micro_batch_waits_for_its_positions_alone(projected: bool) -> None:
    kind = sketch()
    layer = OutputLayer.of(tiny_model(vocabulary=V), vocabulary_size=V)
    hidden_ND = random(5, N, D)
    decoded = kind.decoded(kind.finish(kind.capture(torch, layer.logits(hidden_ND), torch.arange(N), hidden_ND)))
    targets = as_tensors(decoded)
    objective = DistillationObjective(ObjectiveConfig(alpha=0.7, temperature=2.0), kind=kind)
    student_BSD, weight_LD = random(6, 2, N // 2 + 3, D).requires_grad_(), random(7, V, D).requires_grad_()
    labels_BS = torch.full((2, N // 2 + 3), NO_TARGET)
    labels_BS[:, : N // 2] = torch.arange(N).view(2, -1)
    with HostWaits() as waits:
        if projected:
            output = StudentOutput.of_hidden(student_BSD, weight_LD)
        else:
            output = StudentOutput.of_logits(torch.nn.functional.linear(student_BSD, weight_LD))
        terms = objective(output, labels_BS, targets)
        terms.total.backward()
    # Where there are logits of the whole batch: their blocks, and what no position writes, besides.
    assert waits.counts == ({"nonzero": 1} if projected else {"nonzero": 2, "tolist": 1})


@pytest.mark.parametrize("pack", [False, True])
def test_a_whole_micro_batch_waits_twice(tmp_path: Path, pack: bool) -> None:
    """For the number of its positions, and where transformers asks whether positions are those of a packed row."""
    targets = {"logits": {"kind": "head+sketch", "k": 8, "rank": 8, "calibration_positions": 256}}
    cache, student = Cache.open(tiny_cache(tmp_path, targets=targets)), tiny_student(tmp_path / "student")
    arguments = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, disable_tqdm=True, save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    found = []

    class Counted(DistillationTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with HostWaits() as waits:
                loss = super().training_step(*args, **kwargs)
            found.append(waits.counts)
            return loss

    Counted(
        model=load_causal_lm(str(student)), cache=cache, args=arguments, objective=ObjectiveConfig(), pack=pack
    ).train()
    assert found[1:] == 3 * [{"nonzero": 1, "__bool__": 1}]  # the first one is looked at more closely


@pytest.mark.parametrize(
    ("layers", "copies"), [(None, 0), (HiddenStates(layers=(1,), width=D, blocks=2, codec="bf16"), 1)]
)
def test_a_whole_pass_of_the_teacher_waits_for_its_columns_and_figures(layers: Any, copies: int) -> None:
    """However many rows it has; hidden states come one row and layer at a time, each of them looked at for numbers."""
    teacher = Teacher.of(tiny_model(), targets=StoredTargets(sketch(), hidden=layers), layout="documents", pad_id=0)
    ids_S = np.arange(40, dtype=np.int32)
    row = TokenRow("0" * 32, False, ids_S, ids_S < 39, (Segment("", 0, 0, 0, 0),))
    for rows in (1, 1, 8):  # the first one makes constants
        with HostWaits() as waits:
            captured = teacher.capture([row] * rows, positions_per_batch=10**6)
    assert captured[0].columns is not None
    columns = len(sketch().capture(torch, random(1, N, V), torch.arange(N), random(2, N, D)))
    of_layers = {"cpu": 8 * copies} if copies else {}
    assert waits.counts == {
        "numpy": columns + 8 * copies,
        "__bool__": 1 + 8 * copies,
        "tolist": 1,
        **of_layers,
    }


def test_gradients_are_those_of_positions_that_are_asked_for() -> None:
    """To the last bit, padded columns included."""
    logits_RL, labels_N = random(8, N, V + 20), torch.arange(N)
    teacher, weights = no_teacher(labels_N, torch.float32), Weights(0.0, 1.0)
    whole = logits_RL.clone().requires_grad_()
    distillation_sums(
        whole[None], positions_N=torch.arange(N), labels_N=labels_N, teacher=teacher, weights=weights, vocabulary_size=V,
        divergence=forward_kl,
    )[0].backward()  # fmt: skip
    hidden = logits_RL.clone().requires_grad_()
    projected_sums(
        hidden, torch.eye(V + 20), None, labels_N=labels_N, teacher=teacher, weights=weights, vocabulary_size=V
    )[0].backward()
    assert whole.grad is not None and hidden.grad is not None and torch.equal(whole.grad, hidden.grad)


@pytest.mark.parametrize("boundary", [False, True])
def test_a_block_of_a_capture_is_fetched_at_once(boundary: bool) -> None:
    """As many arrays as it has: `numpy` stands for the one copy that a GPU makes of all of them, and constants stay there."""
    kind = sketch()
    begins_V = np.arange(V) % 3 == 0
    targets = StoredTargets(kind, boundary=BoundaryMass.of(begins_V) if boundary else None)
    hidden_ND, labels_N = random(9, N, D), torch.arange(N)
    layer = OutputLayer.of(tiny_model(vocabulary=V), vocabulary_size=V)
    targets.capture(torch, layer.logits(hidden_ND), labels_N, hidden_ND)
    assert kind.basis is not None
    held = [*kind.basis.copies.values(), *(targets.boundary.copies.values() if targets.boundary else ())]
    with HostWaits() as waits:
        captured = targets.capture(torch, layer.logits(hidden_ND), labels_N, hidden_ND)
    assert waits.counts == {"numpy": len(captured)}
    again = [*kind.basis.copies.values(), *(targets.boundary.copies.values() if targets.boundary else ())]
    assert len(held) == 1 + boundary and all(one is other for one, other in zip(held, again, strict=True))
    assert not pickle.loads(pickle.dumps(kind.basis)).copies  # they stay with the device


def hidden() -> Any:
    layer = OutputLayer.of(tiny_model(vocabulary=V), vocabulary_size=V)
    kind = FinalHidden(width=D, step=0.05, calibration_positions=64, vocabulary_size=V)
    return calibrate(kind, layer, [random(4, 400, D)])


KINDS: dict[str, Any] = {
    "top-k": lambda: TopK(6, (1.0, 2.0), "float16", V),
    "top-p": lambda: TopP(6, (1.0, 2.0), "float16", V, p=0.9),
    "full": lambda: Full("float16", V),
    "random-sampling": lambda: RandomSampling(8, 1.0, V),
    "head+sketch": sketch,
    "hidden": hidden,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_takes_along_what_is_beside(name: str) -> None:
    """And changes nothing of its own."""
    kind = KINDS[name]()
    mass_N = random(3, N)
    alone, together = (
        kind.capture(torch, random(1, N, V), torch.arange(N), random(2, N, D), position_seeds("row", N), beside=beside)
        for beside in ({}, {"beside": mass_N})
    )
    assert np.array_equal(together.pop("beside"), mass_N.numpy())
    assert alone.keys() == together.keys()
    assert all(np.array_equal(alone[each], together[each], equal_nan=True) for each in alone)


def test_what_is_packed_comes_back_as_it_was() -> None:
    taken: dict[str, Any] = {
        "flags": torch.tensor([True, False, True]), "ids": torch.arange(6).view(3, 2), "halves": random(1, 3).half(),
        "logits": random(2, 3, 4).T.contiguous().T, "none": torch.empty(3, 0), "codes": torch.arange(3, dtype=torch.int16),
    }  # fmt: skip
    names = sorted(taken, key=lambda name: -taken[name].element_size())
    packed = torch.cat([taken[name].reshape(-1).view(torch.uint8) for name in names])
    found, expected = unpacked(packed, {name: taken[name] for name in names}), to_host(torch, taken)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name
