"""A student's output is one operand, in whichever of its two forms."""

from __future__ import annotations

import pytest
import torch

from objective.seeded import leaves, teacher
from teachercache.objective.logits.operands import Weights, labelled_positions
from teachercache.objective.logits.student_output import StudentOutput, output_sums
from teachercache.objective.token_weighting.entropy import entropy_of_output
from teachercache.tasks.contract import NO_TARGET

V = 40


def both(softcap: float | None) -> tuple[StudentOutput, StudentOutput, torch.Tensor, list[torch.Tensor]]:
    """Through an output layer, and its logits; labels of two rows, some of which are no positions; the leaves."""
    hidden_ND, weight_LD, bias_L = leaves(bias=True)
    hidden_BSD = hidden_ND[: len(hidden_ND) // 2 * 2].unflatten(0, (2, -1))
    logits_BSL = torch.nn.functional.linear(hidden_BSD, weight_LD, bias_L)
    capped = logits_BSL if softcap is None else softcap * torch.tanh(logits_BSL / softcap)
    labels_BS = torch.arange(hidden_BSD[..., 0].numel()).view(2, -1) % V
    labels_BS[:, ::3] = NO_TARGET
    outputs = StudentOutput.of_hidden(hidden_BSD, weight_LD, bias_L, softcap), StudentOutput.of_logits(capped)
    return *outputs, labels_BS, [hidden_ND, weight_LD, bias_L]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_both_forms_have_one_loss_one_gradient_and_one_entropy(softcap: float | None) -> None:
    one, other, labels_BS, variables = both(softcap)
    positions_N, labels_N = labelled_positions(labels_BS)
    found = []
    for output in (one, other):
        sums = output_sums(
            output, positions_N=positions_N, labels_N=labels_N, teacher=teacher("sketch").at(slice(0, len(labels_N))),
            weights=Weights(0.7, 2.0), vocabulary_size=V,
        )  # fmt: skip
        entropy_N = entropy_of_output(output, positions_N=positions_N)
        found.append([*sums, entropy_N, *torch.autograd.grad(sums[0], variables, retain_graph=True)])
    assert (one.columns, one.dtype) == (other.columns, other.dtype)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_blocks_hold_every_positions_logits_once(softcap: float | None) -> None:
    one, other, labels_BS, _ = both(softcap)
    found = [
        torch.cat([logits[labels != NO_TARGET] for _, logits, labels in output.blocks(labels_BS)])
        for output in (one, other)
    ]
    torch.testing.assert_close(found[0], found[1])
    assert len(found[0]) == int((labels_BS != NO_TARGET).sum())
