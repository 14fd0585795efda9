"""Reads the caches of a run: datasets, collators and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from teachercache.cache.reader import Split
from teachercache.stream.cache_rows import CacheRows
from teachercache.stream.collate import Collator, MixedCollator
from teachercache.stream.dataset import CacheDataset, Rows
from teachercache.stream.loading_process import heed_parent_alone
from teachercache.stream.order.batch_plan import spread
from teachercache.stream.withheld import Trained
from teachercache.training.supervision.contract import Columns, Supervision


@dataclass(frozen=True, eq=False)
class Reading:
    """Reads the caches of a run, as its supervision has it."""

    supervision: Supervision
    args: TrainingArguments
    trained: Trained | None = None
    one_row: bool = False  # the student wants all packed rows of a micro-batch in one
    context: int | None = None  # longer rows must tell the student how long they are

    def dataset(self, split: Split, columns: Columns) -> CacheDataset:
        """The rows of a split."""
        return CacheDataset(self._rows(split, columns), split, trained=self.trained)

    def collator(self, split: Split, columns: Columns, *, pack: bool = False) -> MixedCollator:
        """Makes tensors of them."""
        collators = [
            Collator.of(rows, pack=pack, one_row=self.one_row, context=self.context)
            for rows in self._rows(split, columns)
        ]
        return MixedCollator(tuple(collators))

    def _rows(self, split: Split, columns: Columns) -> list[CacheRows]:
        return [self.supervision.rows(number, split, names) for number, names in enumerate(columns)]

    def loader(self, dataset: Any, batch_sampler: Any, collator: Any, **settings: Any) -> DataLoader[Rows]:
        """A loader of these batches in the processes that the arguments ask for."""
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Left to the global generator, starting workers would shift the dropout of a resumed run.
            generator=torch.Generator().manual_seed(self.args.seed),
            **self._workers(),
            **settings,
        )

    def _workers(self) -> dict[str, Any]:
        """Loading processes are forked, but for caches in object stores: a fork inherits locks of the stores' clients, whose
        threads it does not have, and now and then waits for one forever."""
        if self.args.dataloader_num_workers == 0 or not self.supervision.remote:
            return {}
        return {"multiprocessing_context": "spawn", "worker_init_fn": heed_parent_alone}

    def held_out(self, columns: Columns) -> DataLoader[Rows]:
        """This process's share of the held-out rows; worth keeping, its workers hold shards open that they have checked."""
        counts = [cache.rows_of("held-out") for cache in self.supervision.caches]
        batches = [
            batch
            for number, count in enumerate(counts)
            for batch in spread(
                count,
                start=sum(counts[:number]),
                micro_batch=self.args.per_device_train_batch_size,
                rank=self.args.process_index,
                world_size=self.args.world_size,
            )
        ]
        return self.loader(
            self.dataset("held-out", columns),
            batches,
            self.collator("held-out", columns),
            persistent_workers=self.args.dataloader_num_workers > 0,
        )
