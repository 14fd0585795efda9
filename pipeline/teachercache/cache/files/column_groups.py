"""Column groups: which file of a shard holds which columns, and what that file says of itself.

A shard has one file a group, all with the same rows in the same order: `shards/` holds the columns of every row and what is
stored of logits, `targets/hidden/` hidden states, and so on. A part of a cache can be fetched, verified, added or removed
without the others. Each file carries the digest of the settings that its rows were made with, and of those of its targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import ROWS_GROUP, check_inside
from teachercache.cache.files.schema import ROW_FIELDS, check_schema, shard_metadata
from teachercache.errors import CacheDamaged
from teachercache.targets.coding.columns import Column
from teachercache.targets.logits.boundary_mass import SECTION as BOUNDARY
from teachercache.targets.stored import LOGITS, StoredTargets

TARGETS = "targets"  # folder of the groups of further targets
READ_BY_IN_1 = {LOGITS: "basis", "hidden": "layers", "attention": "layers"}  # role of a section's file in format 1
ID_FIELD = ROW_FIELDS[0]  # what a file without the columns of every row names its rows by


ReadBy = Mapping[str, Mapping[str, str]]  # by section of targets and role: `{"logits": {"basis": FILE}}`


def target_digests(targets: Mapping[str, Any], read_by: ReadBy) -> dict[str, str]:
    """Returns a digest for each section of targets over what decides its numbers: its settings, and the files that it
    is read by, whose sha256 `read_by` gives in the place of their names."""
    return {
        section: fingerprint_of({"target": section, "settings": settings, "read_by": dict(read_by.get(section, {}))})
        for section, settings in targets.items()
    }


def check_groups(groups: Mapping[str, Sequence[str]]) -> None:
    """Raise `ValueError` for column groups that no cache has: every section of targets stands in one of them at most. Those
    of a later version may have any folder."""
    sections = [section for names in groups.values() for section in names]
    for folder in groups:
        check_inside(folder)
    if ROWS_GROUP not in groups:
        raise ValueError(f"its groups are {', '.join(groups)[:200]}")
    if len(set(sections)) < len(sections):
        raise ValueError(f"its groups hold {', '.join(sections)[:200]}: a section twice")


@dataclass(frozen=True, eq=False)
class Group:
    """One column group of a cache or an alignment. `settings` is the digest of what its rows were made with, `targets` those
    of its targets by section, `read_by` the files by which the numbers of each section are read, by role."""

    folder: str
    columns: tuple[Column, ...]
    settings: str
    targets: Mapping[str, str] = field(default_factory=dict)
    read_by: ReadBy = field(default_factory=dict)
    has_rows: bool = True
    among_others: bool = False  # its files hold further columns, which only later versions know

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """Arrow's fields before the payload."""
        return ROW_FIELDS if self.has_rows else (ID_FIELD,)

    def metadata(self) -> dict[str, Any]:
        """Metadata of the group's files, their columns apart."""
        read_by = {section: dict(files) for section, files in self.read_by.items() if files}
        beside = {"read_by": read_by} if read_by else {}
        return {"settings_fingerprint": self.settings, "targets": dict(self.targets), **beside}

    def checked(self, schema: pa.Schema) -> dict[str, Any]:
        """The metadata of a file of this group; raises `CacheDamaged` for that of another cache, or with other columns."""
        metadata = shard_metadata(schema)
        # Format 1 has the cache's fingerprint there, and no digests of targets.
        if metadata.get("settings_fingerprint", metadata.get("fingerprint")) != self.settings:
            raise CacheDamaged("it belongs to another cache")
        names = [column.name for column in self.columns]
        check_schema(schema, self.fields, names, among_others=self.among_others)
        for section, digest in self.targets.items():
            if metadata.get("targets", {}).get(section) != digest:
                raise CacheDamaged(f"its {section} are of other settings than the manifest's")
        for section, files in self.read_by.items():
            if (read_by := _read_by(metadata, section)) != dict(files):
                raise CacheDamaged(f"its {section} are read by {str(read_by)[:200]}, the manifest names {dict(files)}")
        return metadata


def _read_by(metadata: Mapping[str, Any], section: str) -> Any:
    """The files that a shard's file says its section is read by; format 1 says them by role alone."""
    if "settings_fingerprint" in metadata:
        return metadata.get("read_by", {}).get(section, {})
    role = READ_BY_IN_1.get(section)
    return {role: metadata[role]} if role is not None and role in metadata else {}


def layout_of(targets: StoredTargets) -> dict[str, tuple[str, ...]]:
    """Assigns sections of targets to groups when a cache is written: folder to sections."""
    layout: dict[str, tuple[str, ...]] = {ROWS_GROUP: ()}
    for section, kind in targets.sections.items():
        if kind.columns:
            folder = ROWS_GROUP if section in (LOGITS, BOUNDARY) else f"{TARGETS}/{section}"
            layout[folder] = (*layout.get(folder, ()), section)
    return layout


def check_placed(targets: StoredTargets, layout: Mapping[str, Sequence[str]]) -> None:
    """Raise `CacheDamaged` for known targets that no group holds."""
    placed = {section for sections in layout.values() for section in sections}
    if missing := sorted(name for name, kind in targets.sections.items() if kind.columns and name not in placed):
        raise CacheDamaged(f"the manifest has targets {', '.join(missing)}, and no column group that holds them")


def groups_of(
    targets: StoredTargets,
    *,
    layout: Mapping[str, Sequence[str]],
    settings: str,
    digests: Mapping[str, str],
    read_by: ReadBy,
) -> tuple[Group, ...]:
    """The groups of a cache, that of all rows first. Groups of targets that this
    version does not know are left out: what reads a cache needs none of them, or its manifest would require it. In a file
    with others that it does know their columns are left alone."""
    kinds = targets.sections
    groups = []
    known = [folder for folder in layout if folder == ROWS_GROUP or not set(kinds).isdisjoint(layout[folder])]
    for folder in sorted(known, key=lambda name: name != ROWS_GROUP):
        sections = [section for section in kinds if section in layout[folder]]
        groups.append(
            Group(
                folder=folder,
                columns=tuple(column for section in sections for column in kinds[section].columns),
                settings=settings,
                targets={section: digests[section] for section in sections if section in digests},
                read_by={section: read_by.get(section, {}) for section in sections},
                has_rows=folder == ROWS_GROUP,
                among_others=not set(layout[folder]) <= set(kinds),
            )
        )
    return tuple(groups)
