"""One work unit through its first stage: its documents, read from their source, as token rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from teachercache.cache.stores.copies import folder_of
from teachercache.cache.stores.store import Store
from teachercache.config import SequenceConfig
from teachercache.corpus.documents import Document
from teachercache.corpus.sequences import Tokenised, tokenise
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.capture.plan import TEACHER, Plan
from teachercache.stage_times import stage


def document_key(document: Document) -> str:
    """Names a document among those of its unit."""
    return f"{document.source_id} {document.occurrence}"


def tokenise_unit(
    plan: Plan,
    unit: int,
    *,
    sequence: SequenceConfig,
    store_text: bool,
    keep: Callable[[str], bool] = lambda key: True,
) -> tuple[Tokenised, int]:
    """Token rows of the unit's documents whose keys are to be kept, and how many documents there are."""
    with stage("reading"):
        documents = plan.documents(unit)
    tokenizer = tokenizer_of(plan.store)
    kept = [document for document in documents if keep(document_key(document))]
    with stage("tokenising"):
        tokenised = tokenise(
            kept, tokenizer=tokenizer, sequence=sequence, store_text=store_text, prefix=plan.prefix_ids
        )
    return tokenised, len(documents)


@lru_cache(maxsize=1)
def tokenizer_of(store: Store) -> Any:
    """The tokenizer of the teacher whose cache is in this store, loaded once a process."""
    with folder_of(store, TEACHER) as folder:
        return load_tokenizer(str(folder))
