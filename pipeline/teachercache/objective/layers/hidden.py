"""Hidden states against hidden states, position by position.

    hidden-cosine   1 - cos(adapter(student), teacher)                              (Sun et al., "Patient KD", 2019)
    hidden-mse      mean over channels of (adapter(student) - teacher)² / variance  (Jiao et al., "TinyBERT", 2020)

The teacher's states are taken less their mean over the corpus, which a cache stores: in transformers a few channels are large
at every token, and a cosine that sees them sees hardly anything else.

Shapes: N positions, Ds and Dt widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.objective.layers.adapter import Adapter, zero_contribution_of_all
from teachercache.objective.layers.term import LayerBatch, StudentShape, hidden_arrays
from teachercache.targets import StoredTargets


class HiddenTerm(torch.nn.Module):
    """Either loss; `variance` is the teacher's mean variance of a channel, by layer, `means` what its states are less, [Dt].

    With `shared` one adapter serves all pairs, and what it learns is one map between the two models' coordinates, which the
    student's layers cannot each have adjusted to themselves.
    """

    of = "hidden"
    measures_similarity = True
    least_segments = 1

    def __init__(
        self,
        match: str,
        pairs: tuple[tuple[int, int], ...],
        *,
        student_width: int,
        teacher_width: int,
        variance: Mapping[int, float],
        means: Mapping[int, Tensor] | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.match, self.pairs, self._variance = match, pairs, variance
        begins = [(means or {}).get(teacher) for _, teacher in pairs]
        if shared:
            known = [mean_D for mean_D in begins if mean_D is not None]
            begins = [torch.stack(known).mean(0) if known else None]
        self.adapters = torch.nn.ModuleList(Adapter(student_width, teacher_width, mean_D=mean_D) for mean_D in begins)

    @classmethod
    def fitted(
        cls,
        config: LayerTermConfig,
        pairs: tuple[tuple[int, int], ...],
        *,
        targets: StoredTargets,
        student: StudentShape,
    ) -> HiddenTerm:
        """See `LayerTerm`."""
        assert targets.hidden is not None
        arrays = {layer: hidden_arrays(targets, layer) for _, layer in pairs}
        variance = {layer: float((stored["spread"] ** 2).mean()) for layer, stored in arrays.items()}
        means = {layer: torch.from_numpy(stored["mean"]) for layer, stored in arrays.items()} if config.centred else {}
        widths = {"student_width": student.width, "teacher_width": targets.hidden.width}
        return cls(config.match, pairs, **widths, variance=variance, means=means, shared=config.adapter == "shared")

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, by all weights: see `LayerTerm`."""
        return zero_contribution_of_all(self.adapters, like)

    def loss(self, batch: LayerBatch) -> Tensor:
        """The sum over positions, the mean over pairs."""
        total = batch.mask_BS.new_zeros((), dtype=torch.float32)
        for adapted_ND, (student, teacher) in zip(self._adapted(batch), self.pairs, strict=True):
            target_ND = batch.teacher_hidden[teacher][batch.mask_BS]
            cosine_N = torch.nn.functional.cosine_similarity(adapted_ND, target_ND, dim=-1)
            batch.similarity.setdefault(student, cosine_N.detach().sum())  # of the first term that has the layer
            if self.match == "hidden-cosine":
                total = total + (1 - cosine_N).sum()
            else:
                scaled_ND = target_ND / self._variance[teacher] ** 0.5
                total = total + (adapted_ND - scaled_ND).square().mean(-1).sum()
        return total / len(self.pairs)

    def _adapted(self, batch: LayerBatch) -> Iterator[Tensor]:
        """Yields the adapted states of each pair, float32 [N, Dt]. A shared adapter runs once, over all of them: see
        `zero_contribution`."""
        states = (batch.hidden[student][batch.mask_BS] for student, _ in self.pairs)
        if len(self.adapters) == len(self.pairs):
            return (adapter(states_ND) for adapter, states_ND in zip(self.adapters, states, strict=True))
        states_PND = torch.stack(list(states))
        return iter(self.adapters[0](states_PND.flatten(0, 1)).unflatten(0, states_PND.shape[:2]))
