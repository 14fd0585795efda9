"""What of caches a run reads: rows of which columns, joined to what, as batches, and which shards are fetched ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.reader import Split
from teachercache.config import ObjectiveConfig
from teachercache.stream.collate import Collator, MixedCollator
from teachercache.stream.dataset import CacheDataset, Rows
from teachercache.stream.loading_process import heed_parent_alone
from teachercache.stream.order.batch_plan import spread
from teachercache.stream.withheld import Trained
from teachercache.training.supervision.ensemble import Teachers

Columns = Sequence[tuple[str, ...]]  # of each cache


@dataclass(frozen=True, eq=False)
class Reading:
    """Of a run's caches, with the alignments of a student of another tokenizer, and further teachers of the same rows."""

    caches: tuple[Cache, ...]
    alignments: tuple[CacheAlignment, ...]
    teachers: Teachers | None
    objective: ObjectiveConfig
    args: TrainingArguments
    trained: Trained | None = None
    one_row: bool = False  # the student wants all packed rows of a micro-batch in one
    context: int | None = None  # longer rows must tell the student how long they are

    def dataset(self, split: Split, columns: Columns) -> CacheDataset:
        """The rows of a split."""
        other_teachers = {} if self.teachers is None else self.teachers.read(split, self.objective)
        return CacheDataset(
            self.caches, split, columns=columns, alignments=self.alignments, trained=self.trained, **other_teachers
        )

    def collator(self, split: Split, columns: Columns, *, pack: bool = False) -> MixedCollator:
        """Rows of it to tensors."""
        joined = self.alignments or [None] * len(self.caches)
        other_teachers = () if self.teachers is None else self.teachers.collated(split, self.objective)
        made = [
            Collator.of(
                cache,
                columns=names,
                pack=pack,
                one_row=self.one_row,
                context=self.context,
                alignment=alignment,
                other_teachers=other_teachers,
            )
            for cache, names, alignment in zip(self.caches, columns, joined, strict=True)
        ]
        return MixedCollator(tuple(made))

    def prefetch(self, shards: Sequence[Sequence[int]], columns: Columns) -> None:
        """Have fetched what holds these columns of these shards of each cache, and what lies beside them, where caches are in
        an object store."""
        if self.teachers is not None:
            self.teachers.prefetch(shards, caches=self._remote, objective=self.objective)
        for number, (cache, numbers, names) in enumerate(zip(self.caches, shards, columns, strict=True)):
            beside = self.alignments[number].infos if self.alignments else None
            cache.prefetch(numbers, columns=names, caches=self._remote, with_infos=beside)

    @property
    def _remote(self) -> int:
        """How many caches are in object stores."""
        return sum(each.is_remote for each in self.caches) + (self.teachers.remote if self.teachers else 0)

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
        if self.args.dataloader_num_workers == 0 or not self._remote:
            return {}
        return {"multiprocessing_context": "spawn", "worker_init_fn": heed_parent_alone}

    def held_out(self, columns: Columns) -> DataLoader[Rows]:
        """This process's share of the held-out rows; worth keeping, its workers hold shards open that they have checked."""
        rows = [each.rows_of("held-out") for each in self.caches]
        batches = [
            batch
            for number, count in enumerate(rows)
            for batch in spread(
                count,
                start=sum(rows[:number]),
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
