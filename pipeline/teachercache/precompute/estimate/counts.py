"""Counts of positions, tokens and units of a corpus, from a sample that is tokenised as the job tokenises.

Positions are the sample's, times how many times the sample the corpus is. Blocks of the sample differ, and that says how
sure the product is: the standard error of a ratio of two sums over blocks (Cochran, Sampling Techniques, 1977, 2.11).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from teachercache.cache.stores.copies import folder_of
from teachercache.config import Recipe
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.sample import CorpusSample
from teachercache.corpus.sequences import Tokenised, tokenise
from teachercache.errors import CorpusError
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.capture.plan import TEACHER, Plan
from teachercache.precompute.estimate.measured import Amount
from teachercache.tokens.rows import TokenRow


@dataclass(frozen=True)
class Counts:
    """Counts of a whole corpus. `error` is the relative standard error of its positions: 0 where all rows were read."""

    corpus: Amount
    documents: float
    quarantined: float
    units: int
    error: float
    factor: float  # of the corpus to the sample
    batched: tuple[list[TokenRow], ...]  # the sample's rows, in the parts within which batches are formed


def count(recipe: Recipe, plan: Plan, sample: CorpusSample) -> Counts:
    """Tokenise the sample of the recipe's corpus, which `plan` is of. Raises `CorpusError` where no row of it is usable."""
    assert recipe.corpus is not None
    with folder_of(plan.store, TEACHER) as folder:
        tokenizer = load_tokenizer(str(folder))
    groups = [*_groups(recipe, plan, sample)]
    parts = [
        tokenise(
            group, tokenizer=tokenizer, sequence=recipe.sequence, store_text=recipe.corpus.store_text,
            prefix=plan.prefix_ids,
        )
        for group in groups
    ]  # fmt: skip
    amounts = [Amount.of(part.rows) for part in parts]
    _check_usable(parts, source=recipe.corpus.source)
    factor = 1.0 if sample.is_whole else sample.factor
    everything = [row for part in parts for row in part.rows]
    measures = [block.measure for block in sample.blocks]
    return Counts(
        corpus=Amount.of(everything) * factor,
        documents=factor * sum(map(len, groups)),
        quarantined=factor * sum(len(part.quarantined) for part in parts),
        units=plan.units if sample.is_whole else _units(recipe, plan, groups, factor),
        error=0.0 if sample.is_whole else ratio_error([amount.positions for amount in amounts], measures),
        factor=factor,
        batched=tuple(part.rows for part in parts) if sample.is_whole else (_once(everything),),
    )


def _groups(recipe: Recipe, plan: Plan, sample: CorpusSample) -> Iterator[list[Document]]:
    """The documents of the job's units, or of the blocks of a sample."""
    assert recipe.corpus is not None
    if sample.is_whole:
        yield from (plan.documents(unit) for unit in range(plan.units))
        return
    for block in sample.blocks:
        yield [item for item in documents(block.rows, recipe.corpus) if isinstance(item, Document)]


def _check_usable(parts: Sequence[Tokenised], *, source: str) -> None:
    if any(row.positions for part in parts for row in part.rows):
        return
    reasons = [lost.reason for part in parts for lost in part.quarantined]
    raise CorpusError(
        f"corpus {source}: none of {len(reasons)} rows can be used; the first one: {reasons[0] if reasons else 'empty'}; "
        "check corpus.text_field, or corpus.messages_field for chat"
    )


def _units(recipe: Recipe, plan: Plan, groups: Sequence[Sequence[Document]], factor: float) -> int:
    """Units where the sample fills none, by the recipe's own bounds of one."""
    if plan.units > 1:
        return max(1, round(factor * (plan.units - 0.5)))  # its last one is half full, on average
    settings = recipe.precompute
    rows = sum(map(len, groups))
    size = sum(len(document.to_json()) + 1 for group in groups for document in group)
    return max(1, math.ceil(factor * max(rows / settings.unit_rows, size / settings.unit_bytes)))


def _once(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows that blocks have in common, once."""
    return [*{row.row_id: row for row in rows}.values()]


def ratio_error(counted: Sequence[float], measures: Sequence[float]) -> float:
    """Relative standard error of Σ counted / Σ measures over blocks; 1 for a single block, of which nothing is known."""
    blocks = len(counted)
    if blocks < 2 or not sum(counted):
        return 1.0
    ratio = sum(counted) / sum(measures)
    squares = sum((count - ratio * measure) ** 2 for count, measure in zip(counted, measures, strict=True))
    return math.sqrt(squares * blocks / (blocks - 1)) / sum(counted)
