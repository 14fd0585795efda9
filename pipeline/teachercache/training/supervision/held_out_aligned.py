"""Evaluation of a student with another tokenizer, on the held-out rows that are aligned with its tokens.

Shapes: B rows, S tokens, N positions, M chunks, U teacher's tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import ObjectiveConfig
from teachercache.objective import NO_TARGET, LossTerms
from teachercache.objective.cross_tokenizer.objective import CrossTokenizerObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.objective.objective_schedule import ScheduleRange
from teachercache.targets.logits.kind import first_choices
from teachercache.training.supervision.held_out import BOTH_TERMS, Measure


class AlignedMeasure(Measure):
    """Measures a student with another tokenizer, whose rows are aligned with the cache's.

    Agreement and KL are measured where chunks begin: there both have read the same bytes.
    """

    def __init__(self, cache: Cache, alignment: CacheAlignment, *, tail: str, device: torch.device) -> None:
        across = [{"match": "projected-kl"}]
        config = ObjectiveConfig.model_validate(
            {"alpha": BOTH_TERMS, "temperature": 1.0, "tail": tail, "across": across}
        )
        self._kind, vocabulary = cache.kind, alignment.vocabulary
        self._objective = aligned_objective(config, cache, alignment)
        self._first_U = torch.from_numpy(vocabulary.first_Vt).long().to(device)
        self.columns = self._objective.columns
        self.sums = torch.zeros(8, dtype=torch.float64, device=device)

    def add(self, output: StudentOutput, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        """See `Measure`."""
        labels_N = labels_BS[labels_BS != NO_TARGET]
        choices = [logits.argmax(-1)[labels != NO_TARGET] for _, logits, labels in output.blocks(labels_BS)]
        self._add(self._objective(output, labels_BS, targets), torch.cat(choices or [labels_N[:0]]), labels_N, targets)

    def _add(self, terms: LossTerms, choice_N: Tensor, labels_N: Tensor, targets: dict[str, Tensor]) -> None:
        first_M = targets["chunk_first"]
        teachers = {name: values for name, values in targets.items() if not name.startswith("chunk_")}
        # Where the teacher's choice has no token of the student's there is nothing to agree with.
        choice_M = self._first_U[first_choices(self._kind, teachers, xp=torch).long().to(self._first_U.device)]
        sums = (
            terms.ce,
            (choice_N == labels_N).sum(),
            torch.tensor(terms.positions),
            targets["chunk_label_bytes"].sum(),
            terms.named["projected-kl"],
            (choice_N[first_M] == choice_M.to(choice_N)).sum(),
            torch.tensor(len(first_M)),
            (choice_M >= 0).sum(),
        )
        self.sums += torch.stack([item.double().to(self.sums.device) for item in sums])

    @staticmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """`loss` (CE, nats per position of the student's), `perplexity`, `bits_per_byte` (which compares across tokenizers),
        `accuracy`; and where chunks begin `kl` (to the teacher, projected) and `top1_agreement`."""
        ce, correct, positions, size, kl, agreeing, chunks, compared = sums.tolist()
        chunks, positions = max(chunks, 1), max(positions, 1)
        values = {
            "loss": ce / positions,
            "perplexity": math.exp(min(ce / positions, 700.0)),
            "bits_per_byte": ce / max(size, 1) / math.log(2),
            "kl": kl / chunks,
            "accuracy": correct / positions,
            "top1_agreement": agreeing / max(compared, 1),
        }
        return {f"{prefix}_{name}": value for name, value in values.items()}


def aligned_objective(
    config: ObjectiveConfig, cache: Cache, alignment: CacheAlignment, *, schedule_range: ScheduleRange | None = None
) -> CrossTokenizerObjective:
    """The objective of a recipe for a cache and its alignment with the student's tokenizer, over what a run asks for."""
    vocabulary = alignment.vocabulary
    return CrossTokenizerObjective(
        config,
        targets=cache.targets,
        first_U=vocabulary.first_Vt,
        emitted_V=vocabulary.emitted_Vs,
        begins_V=alignment.begins_V,
        schedule_range=schedule_range,
    )
