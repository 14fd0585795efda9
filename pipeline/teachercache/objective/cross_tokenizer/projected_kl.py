"""KL between next tokens where both models have read the same bytes, the teacher's carried over to the student's vocabulary.

Each teacher token goes, with its probability, to the student's token of the same bytes, else to the *first* token that the
student gives to those bytes; several may meet. What stays outside on either side is left out of the comparison, and its share
is measured:

    unmapped      the teacher's mass on tokens without a counterpart
    unreachable   the student's mass on tokens that the teacher cannot emit in one step: it would need several tokens for
                  them. Held against a teacher that gives them nothing they would be pushed to zero, and with them the
                  long tokens that a student's vocabulary is made of

So both sides are conditioned on what both can emit in one step:  KL(P' / Σ P' ‖ Q / Σ_reachable Q).
Where a cache gives the tail as one bucket, outcomes are the tokens that the head maps to, and one for all others that the
teacher can emit. Columns beyond the student's vocabulary are nobody's tokens: they are compared, with a teacher that gives them
nothing, and so pushed to zero. With equal vocabularies this is the KL of `objective.logits.divergences`.

A map between vocabularies: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024, and NeMo-RL's cross-tokenizer projection.

Shapes: P chunks of a block, V student's tokens and columns of padding, U teacher's tokens, k tokens of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.objective.cross_tokenizer.softmax import conditioned_kl
from teachercache.targets.logits.softened import Softened


class VocabularyProjection:
    """`first_U`: the student's token for each of the teacher's, -1 for none; `emitted_V`: whether one maps to it. Columns from
    `tokens` on (default: none) are padding."""

    def __init__(self, first_U: Tensor, emitted_V: Tensor, *, tokens: int | None = None) -> None:
        self.first_U, self.emitted_V = first_U.long(), emitted_V
        self.tokens = len(emitted_V) if tokens is None else tokens
        self.compared_V = emitted_V.clone()  # and padding, of which the teacher emits nothing
        self.compared_V[self.tokens :] = True
        # Most of the student's tokens have one token of the teacher's: those are gathered, only the others are added.
        vocabulary = len(emitted_V)
        mapped_U = self.first_U >= 0
        numbers_U = torch.arange(len(first_U), device=first_U.device)
        primary_V = torch.full((vocabulary,), len(first_U), device=first_U.device)
        primary_V[self.first_U[mapped_U].flip(0)] = numbers_U[mapped_U].flip(0)
        self.primary_V = primary_V
        further_U = mapped_U.clone()
        further_U[primary_V[primary_V < len(first_U)]] = False
        self.further = numbers_U[further_U]
        self.further_to = self.first_U[self.further]

    def to(self, device: torch.device) -> VocabularyProjection:
        """On a device."""
        return VocabularyProjection(self.first_U.to(device), self.emitted_V.to(device), tokens=self.tokens)

    def padded(self, columns: int) -> VocabularyProjection:
        """With so many columns in all, itself where it has them."""
        if columns == len(self.emitted_V):
            return self
        emitted_V = torch.nn.functional.pad(self.emitted_V[: self.tokens], (0, columns - self.tokens))
        return VocabularyProjection(self.first_U, emitted_V, tokens=self.tokens)

    def __call__(self, probability_PU: Tensor) -> Tensor:
        """The mass of the teacher's tokens on the student's, [P, V]; unmapped mass is missing."""
        padded_PU = torch.cat([probability_PU, probability_PU.new_zeros(len(probability_PU), 1)], dim=1)
        projected_PV = padded_PU.index_select(1, self.primary_V)
        return projected_PV.index_add_(1, self.further_to, probability_PU.index_select(1, self.further))


class ProjectedKL:
    """The term, for one pair of vocabularies."""

    name = "projected-kl"
    measured = ("unmapped", "unreachable")

    def __init__(self, projection: VocabularyProjection, *, weight: float = 1.0, temperature: float = 1.0) -> None:
        self.weight, self.temperature = weight * temperature**2, temperature
        self._projection = projection

    def values(self, logits_PV: Tensor, teacher: Softened) -> tuple[Tensor, dict[str, Tensor]]:
        """See `PairTerm`."""
        projection = self._projection = self._on(logits_PV.device)
        scaled_PV = logits_PV if self.temperature == 1 else logits_PV / self.temperature
        if teacher.tail is None:
            return self._with_bucket(scaled_PV, teacher)
        with torch.no_grad():
            target_PV = projection(teacher.dense().to(scaled_PV).exp_())
            mapped_P1 = target_PV.sum(-1, keepdim=True)
            target_PV /= mapped_P1.clamp_min(torch.finfo(target_PV.dtype).tiny)
        values_P, unreachable_P = conditioned_kl(scaled_PV, target_PV, projection.compared_V)
        return values_P, {"unmapped": (1 - mapped_P1)[:, 0].clamp_min(0), "unreachable": unreachable_P}

    def _on(self, device: torch.device) -> VocabularyProjection:
        projection = self._projection
        return projection if projection.first_U.device == device else projection.to(device)

    def _with_bucket(self, scaled_PV: Tensor, teacher: Softened) -> tuple[Tensor, dict[str, Tensor]]:
        """Outcomes: the tokens that the head maps to, and all others that the teacher can emit. A renormalised head leaves
        those nothing."""
        projection = self._projection
        log_sum_P1 = scaled_PV.logsumexp(-1, keepdim=True)
        of_compared_P1 = scaled_PV.masked_fill(~projection.compared_V, -torch.inf).logsumexp(-1, keepdim=True)
        with torch.no_grad():
            ids_Pk, merged_Pk = _merged(
                projection.first_U[teacher.head_ids_Nk], teacher.head_log_prob_Nk.to(scaled_PV).exp()
            )
            unmapped_P = (merged_Pk * (ids_Pk < 0)).sum(-1)
            mapped_P1 = (1 - unmapped_P)[:, None].clamp_min(torch.finfo(merged_Pk.dtype).tiny)
            target_Pk = merged_Pk * (ids_Pk >= 0) / mapped_P1
            bucket_P = teacher.tail_log_prob_N.to(scaled_PV).exp() / mapped_P1[:, 0]
            unreachable_P = (1 - (of_compared_P1 - log_sum_P1).exp())[:, 0].clamp_min(0)
        log_student_Pk = scaled_PV.gather(1, ids_Pk.clamp_min(0)) - of_compared_P1
        values_P = torch.xlogy(target_Pk, target_Pk).sum(-1) - (target_Pk * log_student_Pk).sum(-1)
        of_head_Pk = log_student_Pk.masked_fill((ids_Pk < 0) | _repeated(ids_Pk), -torch.inf)
        outside_bucket = [of_head_Pk, scaled_PV[:, projection.tokens :] - of_compared_P1]
        rest_P = torch.log1p(-torch.cat(outside_bucket, -1).logsumexp(-1).exp().clamp(max=1 - 1e-7))
        values_P = values_P + torch.xlogy(bucket_P, bucket_P) - bucket_P * rest_P
        return values_P, {"unmapped": unmapped_P, "unreachable": unreachable_P}


def _merged(ids_Pk: Tensor, probability_Pk: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in rising order, with the mass of equal ones at the first of them and none at the others, [P, k] each."""
    ids_Pk, order_Pk = ids_Pk.sort(dim=-1)
    place_Pk = (~_repeated(ids_Pk)).cumsum(-1) - 1
    number_Pk = torch.arange(ids_Pk.shape[1], device=ids_Pk.device).expand_as(ids_Pk)
    firsts_Pk = torch.full_like(ids_Pk, ids_Pk.shape[1]).scatter_reduce(1, place_Pk, number_Pk, "amin")
    merged_Pk = torch.zeros_like(probability_Pk)
    merged_Pk.scatter_add_(1, firsts_Pk.gather(1, place_Pk), probability_Pk.gather(1, order_Pk))
    return ids_Pk, merged_Pk


def _repeated(sorted_Pk: Tensor) -> Tensor:
    """Marks those of a sorted row's numbers that equal the one before them."""
    return torch.cat(
        [sorted_Pk.new_zeros(len(sorted_Pk), 1, dtype=torch.bool), sorted_Pk[:, 1:] == sorted_Pk[:, :-1]], 1
    )
