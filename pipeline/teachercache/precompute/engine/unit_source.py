"""Unit numbers as a source of Ray Data: rows that are made where they are needed, some to a block.

Each block costs the driver some milliseconds and 15 KB, so there are so many at most, however many units there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

MOST_BLOCKS = 2048
_SCHEMA = pa.schema({"unit": pa.int64(), "payload": pa.binary(), "problem": pa.binary()})


class UnitSource(Datasource):
    """Rows `{unit, payload, problem}` of so many units, without the latter two."""

    def __init__(self, units: Sequence[int]) -> None:
        super().__init__()
        self._units = np.array(units, dtype=np.int64)

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all rows."""
        return self._units.nbytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One for each block: neighbouring units."""
        parts = np.array_split(self._units, min(parallelism, len(self._units)))
        return [
            ReadTask(
                partial(_rows, part),
                BlockMetadata(num_rows=len(part), size_bytes=part.nbytes, exec_stats=None, input_files=None),
                schema=_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for part in parts
        ]


def _rows(units: NDArray[np.int64]) -> Iterator[pa.Table]:
    empty, none = [b""] * len(units), [None] * len(units)
    yield pa.table({"unit": units, "payload": empty, "problem": none}, schema=_SCHEMA)


def units_dataset(units: Sequence[int], *, cpus: float, tasks: int | None = None) -> ray.data.Dataset:
    """Units as a dataset, which so many tasks read at a time, of `cpus` each: a stage of tasks that follows shares them."""
    blocks = min(len(units), MOST_BLOCKS)
    found: ray.data.Dataset = ray.data.read_datasource(
        UnitSource(units), override_num_blocks=blocks, num_cpus=cpus, concurrency=tasks
    )
    return found
