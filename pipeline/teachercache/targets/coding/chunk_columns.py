"""Columns of an alignment: which of a student's tokens stand for the same bytes as which of the teacher's.

A row's *chunks* follow each other and together hold all tokens of both sides, each once. A chunk that is aligned stands for the
same bytes on both sides, between two boundaries that both tokenizers have, and no smaller one does; the others hold what only
one side has (BOS, a template's markup).

Shapes: S tokens of the student, K chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets.coding import pco
from teachercache.targets.coding.columns import Column

MOST_CHUNKS = 256  # for each token of the student
COUNTS = ("teacher_counts", "student_counts")


class ChunkColumns:
    """Columns of an alignment's rows, beside the student's tokens."""

    columns = (
        Column("token_bytes", "<u4", (), pco.NAME, groups=(1,), of="token"),  # of the text, that each token stands for
        *(Column(name, "<u2", (), pco.NAME, groups=(1,), ragged=True, of="token", most=MOST_CHUNKS) for name in COUNTS),
        Column("aligned", "<u2", (), pco.NAME, groups=(1,), ragged=True, of="token", within=(0, 1), most=MOST_CHUNKS),
    )

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` where chunks are not as many in all columns, or do not hold the student's tokens."""
        sizes = {len(stored[name]) for name in (*COUNTS, "aligned") if name in stored}
        if len(sizes) > 1:
            raise CacheDamaged("its chunks are more in one column than in another")
        if "token_bytes" in stored and "student_counts" in stored:
            counted = int(stored["student_counts"].sum(dtype=np.int64))
            if counted != len(stored["token_bytes"]):
                raise CacheDamaged(f"its chunks hold {counted} tokens, the row has {len(stored['token_bytes'])}")
