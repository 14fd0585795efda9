"""Further targets: hidden states and attention of rows that are stored, beside what is there of them.

They stand in column groups of their own, one file a shard, with the same rows in the same order. `.work/growth/targets/` has
the records of an unfinished job: plan.json, layers.json once their layer files are made, and one for each shard that is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache import FileInfo, Manifest, ShardInfo
from teachercache.cache.files.bounds import Count
from teachercache.cache.files.column_groups import Group, groups_of, layout_of, target_digests
from teachercache.cache.files.entries import ShardTable
from teachercache.cache.manifest.manifest import GROWTH
from teachercache.cache.manifest.model import cache_fingerprint
from teachercache.cache.stores.copies import file_of
from teachercache.cache.stores.store import Store, place
from teachercache.errors import CacheError, JobFailed
from teachercache.precompute.capture.plan import made_file
from teachercache.precompute.engine.records import Records, Shard, read_shaped
from teachercache.targets import LayerFile, StoredTargets, TopK
from teachercache.targets.layers.kinds import SECTIONS

WORK = f"{GROWTH}/targets"
PLAN, LAYERS = f"{WORK}/plan.json", f"{WORK}/layers.json"  # what the job is; the files that are made first
REMEDY = "delete it and run the same command again"


class Made(TypedDict):
    """layers.json: the files that the targets are read by, and the sample that they were fitted to."""

    read_by: dict[str, dict[str, str]]
    positions: Count
    rows: list[str]
    sources: list[str]


class Record(TypedDict):
    """Record of a shard that is done; `shard` has the files of the further targets alone."""

    shard: Shard
    column_bytes: dict[str, Count]


MADE: TypeAdapter[Any] = TypeAdapter(Made)
RECORD: TypeAdapter[Any] = TypeAdapter(Record)


@dataclass(frozen=True)
class FurtherTargets:
    """Targets that are to be added to the cache in a store; travels to the workers. `targets` are the layers that it lacks
    (beside a kind of logits that nobody captures); `units` counts its shards."""

    store: Store
    targets: StoredTargets
    units: int
    cache: str  # fingerprint of the cache
    settings: str  # its settings_fingerprint
    longest: int
    pad_id: int
    layout: str
    dtype: str  # that its teacher was loaded in

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections of targets that are added."""
        return tuple(kind.section for kind in self.targets.layers)

    def made(self) -> dict[str, Any] | None:
        """The record of the layer files, once they are made."""
        return read_shaped(self.store, LAYERS, MADE, remedy=REMEDY)

    def record_name(self, unit: int) -> str:
        """Name of a shard's record, which is written once its files are in place."""
        return self.records().name(unit)

    def records(self) -> Records:
        """Records of the shards that are done."""
        folders = set(self.layout_of_groups())
        return Records(
            self.store, f"{WORK}/done", self.units, RECORD, lambda _, record: set(record["shard"]["files"]) == folders
        )

    def pending(self) -> list[int]:
        """Shards that are still to be done."""
        return self.records().pending()

    def loaded(self) -> StoredTargets:
        """The targets with their layer files, if these have been made."""
        targets = self.targets
        for section, files in (self.made() or {"read_by": {}})["read_by"].items():
            with file_of(self.store, files["layers"]) as path:
                layers = LayerFile.load(path)
            targets = targets.with_layer_file(section, layers, longest=self.longest)
        return targets

    def groups(self) -> tuple[Group, ...]:
        """The column groups that the files of a shard are written in."""
        targets = self.loaded()
        made = self.made()
        assert made is not None
        groups = groups_of(
            targets,
            layout=self.layout_of_groups(),
            settings=self.settings,
            digests=self.digests(),
            read_by=made["read_by"],
        )
        return tuple(group for group in groups if not group.has_rows)

    def layout_of_groups(self) -> dict[str, tuple[str, ...]]:
        """Column groups of the sections that have columns."""
        layout = layout_of(self.targets)
        return {
            folder: sections for folder, sections in layout.items() if set(sections) <= set(self.sections) and sections
        }

    def digests(self) -> dict[str, str]:
        """Digests of the targets that are added; see `Manifest.target_digests`."""
        made = self.made()
        assert made is not None
        hashed = {
            section: {role: made_file(self.store, name).sha256 for role, name in files.items()}
            for section, files in made["read_by"].items()
        }
        return target_digests(self.added_settings(), hashed)

    def added_settings(self) -> dict[str, Any]:
        """Settings of the sections that are added."""
        return {section: kind.settings() for section, kind in self.targets.sections.items() if section in self.sections}

    def begin(self) -> None:
        """Write down what the job is, or find it begun. Raises `CacheError` for an unfinished one of other targets."""
        wanted = json.dumps(self.added_settings(), sort_keys=True).encode()
        if not self.store.put_if_absent(PLAN, wanted) and self.store.get(PLAN) != wanted:
            raise CacheError(
                f"{self.store.name} has an unfinished job that adds other targets; go on with those, or delete "
                f"{place(self.store, WORK)}"
            )


def further_targets(manifest: Manifest, asked: StoredTargets, *, store: Store) -> FurtherTargets | None:
    """The part of a recipe's targets that a finished cache lacks; None where that is nothing.

    Raises `CacheError` for boundary mass, which is taken from logits while these are captured, and for attention that is
    rebuilt from hidden states which the cache does not have.
    """
    missing = [section for section in asked.sections if section not in manifest.targets]
    if not missing:
        return None
    if others := [section for section in missing if section not in SECTIONS]:
        raise CacheError(
            f"targets.{others[0]} of {store.name} can only be stored with its logits; set it as the cache has it, or "
            "precompute another cache"
        )
    layers: dict[str, Any] = {section: getattr(asked, section) for section in missing}
    return FurtherTargets(
        store=store,
        cache=manifest.fingerprint,
        targets=StoredTargets(TopK(1, (1.0,), "float16", manifest.outcomes), **layers),
        units=len(manifest.shards),
        settings=manifest.settings_fingerprint,
        longest=manifest.sequence_length,
        pad_id=manifest.pad_id,
        layout=manifest.layout,
        dtype=manifest.settings["teacher"]["dtype"],
    )


def with_further_targets(manifest: Manifest, plan: FurtherTargets) -> Manifest:
    """The manifest of the cache with the targets that its shards have by now. Raises `JobFailed` where some lack them."""
    records = plan.records().finished()
    if len(records) < plan.units:
        raise JobFailed(
            f"{plan.units - len(records)} of {plan.units} shards lack the targets; run the same command again"
        )
    made = plan.made()
    assert made is not None
    sizes = Counter(manifest.column_bytes)
    for record in records.values():
        sizes.update(record["column_bytes"])
    digests = {**manifest.target_digests, **plan.digests()}
    names = sorted({name for files in made["read_by"].values() for name in files.values()})
    return replace(
        manifest,
        fingerprint=cache_fingerprint(manifest.settings_fingerprint, digests, manifest.corpus, manifest.units),
        targets={**manifest.targets, **plan.added_settings()},
        target_digests=digests,
        read_by={**manifest.read_by, **made["read_by"]},
        groups={**manifest.groups, **plan.layout_of_groups()},
        shards=ShardTable.of(_with_files(shard, records[unit]) for unit, shard in enumerate(manifest.shards)),
        files=sorted([*manifest.files, *(made_file(plan.store, name) for name in names)], key=lambda info: info.file),
        column_bytes=dict(sizes),
        calibration=_both_samples(manifest.calibration, made),
        index=(),
    )


def _with_files(shard: ShardInfo, record: Mapping[str, Any]) -> ShardInfo:
    files = {group: FileInfo(**file) for group, file in record["shard"]["files"].items()}
    return replace(shard, files={**shard.files, **files})


def _both_samples(calibration: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Rows that something was fitted to, then or now: fidelity is never measured on them."""
    both = {name: sorted({*calibration.get(name, ()), *made[name]}) for name in ("rows", "sources")}
    return {**calibration, **both, "positions": calibration.get("positions", 0) + made["positions"]}
