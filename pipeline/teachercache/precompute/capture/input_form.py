"""Checks that rows begin as the teacher is used to: its loss on a small sample, with what the recipe puts in front and
with the other forms that families expect (nothing, BOS, EOS).

All forms are read over the same tokens and scored on the same labels: what counts is the mean of their differences beside its
standard error. A wrong beginning costs Gemma 3 270M four nats a label on such a sample, a harmless one SmolLM2 0.06. What the
check costs is a pass over so many tokens for each form.

Shapes: N labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from teachercache.cache.stores.copies import folder_of
from teachercache.cache.stores.store import holds
from teachercache.config import RowPrefix, SequenceConfig
from teachercache.corpus.sequences import tokenise
from teachercache.errors import RecipeError
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.capture.plan import INPUT_FILE, TEACHER, Plan
from teachercache.precompute.engine.records import put_record
from teachercache.precompute.planning.sample import salted_hash
from teachercache.tokens.prefix import begins_with, row_prefix
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teachercache.teacher import Teacher

DOCUMENTS = 32  # of the corpus's sample, that windows are drawn from
WINDOW = 44  # tokens: the middle of a long window misses what stands in front less than its beginning
POSITIONS = 128  # three such windows
# About what the `compact` preset loses of the teacher (0.12 nats at T = 1): below it, something else limits a cache.
MARGIN = 0.1
CERTAIN = 3.0  # standard errors of the mean difference

Forms = dict[RowPrefix, tuple[int, ...]]


def check_input(teacher: Teacher, plan: Plan, *, positions_per_batch: int) -> None:
    """Measure, once a job, and write the record that `Plan.input_form` reads; an empty one if there is nothing to measure."""
    if holds(plan.store, INPUT_FILE):
        return
    sequence = SequenceConfig.model_validate(plan.identity["sequence"])
    with folder_of(plan.store, TEACHER) as folder:
        tokenizer = load_tokenizer(str(folder))
    chats = plan.identity["corpus"].get("messages_field") is not None
    forms = _forms(tokenizer, sequence.prefix, plan.prefix_ids, chats=chats)
    rows = _sample(plan, tokenizer, forms, longest=sequence.length)
    nats_N = {name: _nats(teacher, rows, prefix, positions_per_batch) for name, prefix in forms.items()}
    # Several actors may measure at once: the first one counts.
    put_record(plan.store, INPUT_FILE, compared(sequence.prefix, nats_N))


def _forms(tokenizer: PreTrainedTokenizerBase, chosen: RowPrefix, prefix: tuple[int, ...], *, chats: bool) -> Forms:
    """Lists the forms to compare, each once, by the recipe's word for it: the chosen one first."""
    forms: Forms = {chosen: prefix}
    for name in get_args(RowPrefix):
        try:
            ids = row_prefix(tokenizer, name, chats=chats)
        except RecipeError:  # no such token
            continue
        if ids not in forms.values():
            forms[name] = ids
    return forms


def _sample(plan: Plan, tokenizer: PreTrainedTokenizerBase, forms: Forms, *, longest: int) -> list[TokenRow]:
    """Windows of the corpus by content hash, without anything in front."""
    length = min(WINDOW, longest - max(map(len, forms.values())))
    if length < 2:
        return []
    documents = plan.sample()[:DOCUMENTS]
    tokenised = tokenise(
        documents, tokenizer=tokenizer, sequence=SequenceConfig(length=length), store_text=False, prefix=()
    )
    rows = [_bare(row, forms) for row in tokenised.rows]
    rows = sorted((row for row in rows if row.positions), key=lambda row: salted_hash(row.row_id))
    rows = [row for row in rows if row.length > length // 2] or rows
    taken = np.cumsum([row.positions for row in rows])
    return rows[: int(np.searchsorted(taken, POSITIONS)) + 1]


def _bare(row: TokenRow, forms: Forms) -> TokenRow:
    """Without what a chat template has written in front."""
    written = next((len(prefix) for prefix in forms.values() if prefix and begins_with(row.input_ids_S, prefix)), 0)
    return _replaced(row, row.input_ids_S[written:], row.target_mask_S[written:])


def _replaced(row: TokenRow, ids_S: NDArray[np.int32], mask_S: NDArray[np.bool_]) -> TokenRow:
    return TokenRow(row.row_id, row.held_out, ids_S, mask_S, row.segments[:1])


def _nats(teacher: Teacher, rows: list[TokenRow], prefix: tuple[int, ...], size: int) -> NDArray[np.float64]:
    """-log p of the labels of all rows, with a prefix in front."""
    before_S = np.array(prefix, dtype=np.int32)
    begun = [
        _replaced(
            row,
            np.concatenate([before_S, row.input_ids_S]),
            np.concatenate([np.zeros(len(prefix), np.bool_), row.target_mask_S]),
        )
        for row in rows
    ]
    losses = teacher.label_nats(begun, positions_per_batch=size)
    missing = [np.full(row.positions, np.nan) for row in begun]
    return np.concatenate(
        [np.zeros(0), *(loss if loss is not None else nan for loss, nan in zip(losses, missing, strict=True))]
    )


def compared(chosen: RowPrefix, nats_N: Mapping[RowPrefix, NDArray[np.float64]]) -> dict[str, Any]:
    """`positions`, mean `nats` of each form, the `chosen` one, and `better`: the best form, where the chosen one is clearly
    worse; else None. Labels that some form gives no finite number for, as of rows that did not fit into memory, count in
    none; {} where no others are left."""
    finite_N = np.logical_and.reduce([np.isfinite(values) for values in nats_N.values()])
    nats_N = {name: values[finite_N] for name, values in nats_N.items()}
    positions = len(nats_N[chosen])
    means = {name: float(values.mean()) for name, values in nats_N.items()} if positions else {}
    if not means:
        return {}
    best = min(means, key=lambda name: (means[name], name != chosen))
    differences_N = nats_N[chosen] - nats_N[best]
    error = float(differences_N.std()) / math.sqrt(positions)
    worse = means[chosen] - means[best] > max(MARGIN, CERTAIN * error)
    nats = {name: round(mean, 4) for name, mean in means.items()}
    return {"positions": positions, "chosen": chosen, "nats": nats, "better": best if worse else None}


_SAID = {
    "auto": "what its tokenizer puts in front",
    "bos": "its beginning-of-sequence token in front",
    "eos": "its end-of-sequence token in front",
    "none": "nothing in front",
}


def input_warning(measured: Mapping[str, Any]) -> str | None:
    """A line for the user where another form is clearly better for the teacher."""
    better = measured.get("better")
    if better is None:
        return None
    nats, chosen = measured["nats"], measured["chosen"]
    return (
        f"warning: on {measured['positions']} positions of the corpus the teacher's loss is {nats[chosen]:.2f} nats with "
        f"{_SAID[chosen]} (sequence.prefix: {chosen}) and {nats[better]:.2f} with {_SAID[better]}; stop, and set "
        f"sequence.prefix: {better}, if that is how this teacher was trained"
    )
