"""Losses on how states lie to one another, not where: nothing needs the teacher's width but channel correlations.

    distances             of pairs of positions, in units of their mean                     (Park et al., "RKD", 2019)
    angles                at one position between two others                                (likewise)
    sample-distances      of pairs of segments (documents, or windows of them), by the mean of their positions
    channel-correlation   correlations of adapted channels with each other over positions   (Gram matching)

Positions are drawn evenly from a micro-batch, the same ones at every pass. These terms have one value a micro-batch; it
counts once for each of its positions, so that micro-batches weigh as they do in all other terms.

Shapes: N positions, M drawn ones, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from teachercache.config import LayerTermConfig
from teachercache.objective.layers.adapter import Adapter, zero_contribution_of_all
from teachercache.objective.layers.term import LayerBatch, StudentShape
from teachercache.targets import StoredTargets

DRAWN = {"distances": 128, "angles": 32}
LEAST = 3  # positions, or segments, that have a structure


class StructureTerm(torch.nn.Module):
    """Any of the four."""

    of = "hidden"
    measures_similarity = False

    def __init__(
        self, match: str, pairs: tuple[tuple[int, int], ...], *, student_width: int, teacher_width: int
    ) -> None:
        super().__init__()
        self.match, self.pairs = match, pairs
        needed = pairs if match == "channel-correlation" else ()
        self.adapters = torch.nn.ModuleList(Adapter(student_width, teacher_width) for _ in needed)

    @classmethod
    def fitted(
        cls,
        config: LayerTermConfig,
        pairs: tuple[tuple[int, int], ...],
        *,
        targets: StoredTargets,
        student: StudentShape,
    ) -> StructureTerm:
        """See `LayerTerm`."""
        assert targets.hidden is not None
        return cls(config.match, pairs, student_width=student.width, teacher_width=targets.hidden.width)

    @property
    def least_segments(self) -> int:
        """See `LayerTerm`."""
        return LEAST if self.match == "sample-distances" else 1

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, by all weights: see `LayerTerm`."""
        return zero_contribution_of_all(self.adapters, like)

    def loss(self, batch: LayerBatch) -> Tensor:
        """The value times the number of positions, the mean over pairs."""
        total = batch.mask_BS.new_zeros((), dtype=torch.float32)
        for number, (student, teacher) in enumerate(self.pairs):
            sides = (batch.hidden[student], batch.teacher_hidden[teacher])
            if self.match == "sample-distances":
                student_MD, teacher_MD = (_segment_means(hidden_BSD, batch) for hidden_BSD in sides)
            else:
                student_MD, teacher_MD = (_drawn(hidden_BSD[batch.mask_BS], self.match) for hidden_BSD in sides)
            if self.match == "channel-correlation":  # the adapter runs in any case: see `zero_contribution`
                student_MD = self.adapters[number](student_MD)
            if len(student_MD) < LEAST:
                total = total + student_MD.sum() * 0.0
            elif self.match == "channel-correlation":
                total = total + (_correlation(student_MD) - _correlation(teacher_MD)).square().mean()
            elif self.match == "angles":
                total = total + smooth_l1_loss(_angles(student_MD), _angles(teacher_MD))
            else:
                total = total + smooth_l1_loss(_distances(student_MD), _distances(teacher_MD))
        return total * batch.mask_BS.sum() / len(self.pairs)


def _drawn(hidden_ND: Tensor, match: str) -> Tensor:
    count = DRAWN.get(match, len(hidden_ND))
    if len(hidden_ND) <= count:
        return hidden_ND.float()
    index_M = torch.arange(count, device=hidden_ND.device) * len(hidden_ND) // count
    return hidden_ND[index_M].float()


def _segment_means(hidden_BSD: Tensor, batch: LayerBatch) -> Tensor:
    """[M, D] of the segments that have positions."""
    segments = max(1, int(batch.segment_BS.max()) + 1)
    row_B = torch.arange(len(hidden_BSD), device=hidden_BSD.device)
    number_N = (row_B[:, None] * segments + batch.segment_BS)[batch.mask_BS]
    _, place_N, count_M = number_N.unique(return_inverse=True, return_counts=True)
    hidden_ND = hidden_BSD[batch.mask_BS].float()
    sums_MD = hidden_ND.new_zeros(len(count_M), hidden_ND.shape[-1]).index_add(0, place_N, hidden_ND)
    means_MD: Tensor = sums_MD / count_M[:, None]
    return means_MD


def _distances(states_MD: Tensor) -> Tensor:
    """Computes the distances of all pairs, over their mean. By differences of squares: the gradient of a distance of
    zero is not one."""
    states_MD = states_MD - states_MD.mean(0)  # differences of large squares would cancel
    squares_M = states_MD.square().sum(-1)
    squared_MM = (squares_M[:, None] + squares_M - 2 * states_MD @ states_MD.T).clamp_min(0.0)
    distances_MM = (squared_MM + 1e-8).sqrt()
    off_diagonal_MM = ~torch.eye(len(states_MD), dtype=torch.bool, device=states_MD.device)
    chosen = distances_MM[off_diagonal_MM]
    return chosen / chosen.mean().clamp_min(1e-8)


def _angles(states_MD: Tensor) -> Tensor:
    """Cosines [M, M, M] at each position between the directions to any two others."""
    directions_MMD = normalize(states_MD[None] - states_MD[:, None], dim=-1, eps=1e-6)
    return directions_MMD @ directions_MMD.transpose(1, 2)


def _correlation(states_MD: Tensor) -> Tensor:
    """Computes the correlations of channels, [D, D]."""
    centred_MD = normalize(states_MD - states_MD.mean(0), dim=0, eps=1e-6)
    return centred_MD.T @ centred_MD
