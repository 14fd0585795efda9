"""`Cache`: rows of a finished cache by (split, index), and what they are read by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from teachercache.cache.files.bounds import MOST_CALIBRATION_BYTES
from teachercache.cache.files.column_groups import Group, check_placed, groups_of
from teachercache.cache.files.entries import ROWS_GROUP, FileInfo, ShardInfo, ShardTable
from teachercache.cache.manifest.manifest import MANIFEST, UPGRADE
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.manifest.snapshots import SNAPSHOTS, parted, read_snapshot
from teachercache.cache.shards.shard import Shard, StoredRow
from teachercache.cache.shards.shard_set import SPLITS, ShardSet, Split
from teachercache.cache.storage.source import (
    TEACHER,
    LocalFiles,
    Source,
    loadable,
    private_folder,
    source_of,
)
from teachercache.cache.token_texts import listed_token_texts
from teachercache.config import LOCAL_COPIES, LOCAL_COPIES_BYTES
from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets import BoundaryMass, LayerFile, StoredTargets, TargetKind
from teachercache.targets.stored import LOGITS, check_known
from teachercache.tasks.contract import Task
from teachercache.tasks.known import TASKS, task_named
from teachercache.tasks.next_token import NEXT_TOKEN

__all__ = ["SPLITS", "Cache", "Split", "StoredRow"]


class Cache(ShardSet):
    """A finished cache. Cheap to open whatever its size; picklable, workers open files for themselves."""

    def __init__(
        self, source: Source, manifest: Manifest, task: Task = NEXT_TOKEN, *, is_snapshot: bool = False
    ) -> None:
        super().__init__(manifest.shards, source)
        self.manifest, self.task = manifest, task
        self.is_snapshot = is_snapshot  # an earlier manifest than the cache's own
        self._targets: StoredTargets | None = None
        self._groups: tuple[Group, ...] | None = None

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        local: str | Path = LOCAL_COPIES,
        local_bytes: int = LOCAL_COPIES_BYTES,
        tasks: Sequence[Task] = TASKS,
        as_of: str | None = None,
    ) -> Cache:
        """Open the cache in a folder, or at a URL such as `s3://BUCKET/PREFIX`. `LOCATION@FINGERPRINT` is the cache as it was
        before rows or targets were added (manifest/snapshots.py). So is `as_of`, the fingerprint that a run has written down;
        where no such manifest is kept, it is the cache as it is.

        Files of a URL are fetched when they are needed, checked, and kept in the folder `local`, which holds at most
        `local_bytes` and which all processes of a machine share. `tasks` are those that the reader knows. Raises `CacheError`
        when the cache is missing, half written or of another task, `CacheDamaged` when its manifest cannot be trusted,
        `JobFailed` when an object store does not answer.
        """
        place, snapshot = parted(location)
        source = source_of(place, local=local, local_bytes=local_bytes)
        knows = frozenset(task.name for task in tasks)
        manifest = source.manifest(knows=knows)
        if snapshot is None and as_of is not None and _keeps(source, as_of):
            snapshot = as_of
        is_snapshot = snapshot is not None and not manifest.fingerprint.startswith(snapshot)
        if snapshot is not None and is_snapshot:
            names, read = source.names(SNAPSHOTS), (source.read, source.read_listed)
            manifest = read_snapshot(names, *read, fingerprint=snapshot, of=source.name, knows=knows)
        return cls(source, manifest, _task_of(manifest, tasks, name=source.name), is_snapshot=is_snapshot)

    @property
    def name(self) -> str:
        """The folder or URL, for messages."""
        return self.source.name

    @property
    def folder(self) -> Path:
        """The folder of a cache that lies in one. Raises `CacheError` for one in an object store."""
        if not isinstance(self.source, LocalFiles):
            raise CacheError(f"{self.name} is in an object store; copy it into a folder for this")
        return self.source.folder

    @property
    def kind(self) -> TargetKind:
        """Reader of the logit targets, with the basis that they need. Raises `CacheError` for a cache without them."""
        self.check_logits()
        return self.targets.logits

    def check_logits(self) -> None:
        """Raise `CacheError` for a cache that stores no logits, or of a kind that only later versions read."""
        check_known(LOGITS, self.manifest.targets)
        if not self.manifest.logits:
            stored = ", ".join(sorted(self.manifest.targets)) or "tokens"
            raise CacheError(
                f"{self.name} stores no logits, only {stored}; use a cache that has them, or precompute one with targets.logits"
            )

    @property
    def logit_columns(self) -> tuple[str, ...]:
        """Columns of the logit targets."""
        return tuple(column.name for column in self.kind.columns)

    @property
    def targets(self) -> StoredTargets:
        """Readers of everything that is stored of the teacher, with the files that this needs; loaded once."""
        if self._targets is None:
            name = self.manifest.read_by.get(LOGITS, {}).get("basis")
            with self._read_by("basis", name) as basis:
                self._targets = self._with_layer_files(self.manifest.stored_targets(basis=basis))
        return self._targets

    def _with_layer_files(self, targets: StoredTargets) -> StoredTargets:
        """The targets with the layer file of each kind of layers: its own, or in format 1 the same one."""
        loaded: dict[str, LayerFile] = {}
        for section in (kind.section for kind in targets.layers):
            name = self.manifest.read_by.get(section, {}).get("layers")
            if name is None:
                raise CacheDamaged(
                    f"{self.name}: the manifest names no layer file of its {section}; fetch the cache again"
                )
            with self._read_by("layers", name) as path:
                assert path is not None
                if name not in loaded:
                    loaded[name] = LayerFile.load(path)
                longest = self.manifest.sequence_length
                targets = targets.with_layer_file(section, loaded[name], longest=longest, name=path)
        return targets

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its column groups, that with the columns of every row first."""
        if self._groups is None:
            self._groups = groups_of_cache(self.manifest, self.targets)
        return self._groups

    @property
    def boundary(self) -> BoundaryMass | None:
        """Boundary mass, with the set of tokens that it is of, where it is stored. Read when first asked for: training
        on the teacher's own tokens never does. Raises `CacheDamaged` for a file that holds another set."""
        boundary = self.targets.boundary
        if boundary is None or boundary.begins_V is not None:
            return boundary
        with self._read_by("boundary tokens", f"{TEACHER}/{boundary.file}") as path:
            assert path is not None
            self._targets = replace(self.targets, boundary=boundary.with_set(path))
        return self._targets.boundary

    @contextmanager
    def _read_by(self, role: str, name: str | None) -> Iterator[Path | None]:
        """The file that the manifest names to read targets by, its bytes checked as those of shards are."""
        if name is None:
            yield None
            return
        info = next((info for info in self.manifest.files if info.file == name), None)
        if info is None:
            raise CacheDamaged(
                f"{self.name}: the manifest names the {role} {name}, but no such file; fetch the cache again"
            )
        with loadable(self.source, info, most=MOST_CALIBRATION_BYTES) as path:
            yield path

    def teacher_folder(self) -> AbstractContextManager[Path]:
        """Tokenizer files and the teacher's config.json, which training needs instead of the teacher: a folder of this process
        with checked copies of them, and of nothing that the manifest does not list, which is gone when it is closed."""
        return private_folder(self.source, self._teacher_files, within=TEACHER)

    def token_texts(self) -> dict[int, str]:
        """Readable texts of the teacher's tokens by id; see `token_texts.token_texts`."""
        return listed_token_texts(self.source, self._teacher_files, within=TEACHER)

    @property
    def _teacher_files(self) -> list[FileInfo]:
        # As large as shards, and read by themselves.
        large = [name for files in self.manifest.read_by.values() for name in files.values()]
        return [info for info in self.manifest.files if info.file.startswith(f"{TEACHER}/") and info.file not in large]

    def positions_of(self, split: Split) -> int:
        """Number of stored targets of a split."""
        held_out = int(self.infos.counted("held_out_positions").sum())
        return held_out if split == "held-out" else self.manifest.positions - held_out

    @property
    def is_remote(self) -> bool:
        """Tells whether it is in an object store."""
        return not isinstance(self.source, LocalFiles)

    def folders_of(self, columns: Sequence[str] | None) -> list[str]:
        """The groups whose files hold these columns (None: all that this version knows) and those of every row."""
        return [
            folder
            for folder, held in self._columns_of_folders.items()
            if folder == ROWS_GROUP or columns is None or not held.isdisjoint(columns)
        ]

    @cached_property
    def _columns_of_folders(self) -> dict[str, frozenset[str]]:
        # Of kinds without their files, which are not fetched for it; prefetching asks at every turn of an epoch.
        groups = groups_of_cache(self.manifest, self.manifest.stored_targets())
        return {group.folder: frozenset(column.name for column in group.columns) for group in groups}

    @property
    def columns(self) -> tuple[str, ...]:
        """All payload columns."""
        return tuple(column.name for group in self.groups for column in group.columns)

    def prefetch(
        self,
        shards: Iterable[int],
        *,
        columns: Sequence[str] | None = None,
        caches: int = 1,
        with_infos: ShardTable | None = None,
    ) -> None:
        """Begin to fetch the files of shards (by their numbers, the ones needed first in front) of a cache in an object store
        that hold these columns; None: all.

        It replaces what an earlier call asked for, takes as many as half of `local_bytes` hold (shared among so many
        `caches`), and never raises: what
        cannot be fetched raises when it is read. Does nothing for a cache in a folder. `with_infos` are the shards of an
        alignment, in the same order, which are fetched with those that they belong to.
        """
        if not self.is_remote:
            return
        folders = self.folders_of(columns)
        self.source.prefetch(self._files_of(shards, folders, with_infos), caches=caches)

    def _files_of(
        self, shards: Iterable[int], folders: Sequence[str], with_infos: ShardTable | None
    ) -> Iterable[FileInfo]:
        for number in shards:
            yield from (self.infos.files[folder][number] for folder in folders)
            if with_infos:
                yield from with_infos[number].files.values()

    def opened(self, info: ShardInfo, mapped: Callable[[FileInfo], pa.MemoryMappedFile]) -> Shard:
        """See `ShardSet`."""
        return Shard(
            info,
            mapped,
            groups=self.groups,
            payload=self.targets,
            vocabulary_size=self.manifest.vocabulary_size,
            longest=self.manifest.sequence_length,
        )


def _keeps(source: Source, fingerprint: str) -> bool:
    return f"{SNAPSHOTS}/{fingerprint}/{MANIFEST}" in source.names(SNAPSHOTS)


def _task_of(manifest: Manifest, tasks: Sequence[Task], *, name: str) -> Task:
    task = task_named(manifest.task["name"], tasks)
    if task is None:
        raise CacheError(
            f"{name} is of the task {manifest.task['name']}, which this version of teachercache lacks; {UPGRADE}"
        )
    return task


def groups_of_cache(manifest: Manifest, targets: StoredTargets) -> tuple[Group, ...]:
    """The column groups that a manifest describes; `targets` need not have their files. Raises `CacheDamaged` where no group
    holds them."""
    check_placed(targets, manifest.groups)
    return groups_of(
        targets,
        layout=manifest.groups,
        settings=manifest.settings_fingerprint,
        digests=manifest.target_digests,
        read_by=manifest.read_by,
    )
