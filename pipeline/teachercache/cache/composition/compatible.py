"""Shards of two caches may stand in one where their settings and their targets have equal digests. Says why they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teachercache.cache.manifest.manifest_v1 import FORMAT_VERSION as FORMAT_1
from teachercache.cache.manifest.model import Manifest
from teachercache.errors import CacheError
from teachercache.nested import differences, shortened


def check_compatible(first: Manifest, other: Manifest, *, name: str, of: str) -> None:
    """Raise `CacheError`, which names the first key that differs, where shards of the cache `of` may not stand beside those of
    the cache `name`."""
    for manifest, place in ((first, name), (other, of)):
        check_version(manifest, name=place)
    settings = {"settings": first.settings, "targets": first.targets, "groups": _plain(first.groups)}
    others = {"settings": other.settings, "targets": other.targets, "groups": _plain(other.groups)}
    if difference := first_difference(settings, others):
        raise CacheError(
            f"{of} was made with other settings than {name}: {difference}; only shards of equal settings may stand in one cache"
        )
    check_same_files(first, other, name=name, of=of)
    if difference := first_difference({"held_out": _share(first)}, {"held_out": _share(other)}, "corpus"):
        raise CacheError(
            f"{of} holds out other documents than {name}: {difference}; precompute it again with the share of {name}"
        )


def check_same_files(first: Manifest, other: Manifest, *, name: str, of: str) -> None:
    """Raise `CacheError` where targets of equal settings are read by other files: codes would mean other numbers."""
    for section in first.targets:
        if first.target_digests.get(section) != other.target_digests.get(section):
            raise CacheError(
                f"the {section} of {of} are read by other files in teacher/ than those of {name}, because each was calibrated "
                f"by itself; precompute it again with targets.calibration_from: {name}"
            )


def check_version(manifest: Manifest, *, name: str) -> None:
    """Raise `CacheError` for a cache of format 1, whose shards do not say which settings they are of."""
    if manifest.format_version == FORMAT_1:
        raise CacheError(
            f"{name} has format version {FORMAT_1}, whose shards belong to that one cache; precompute it again to use it here"
        )


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """The first key, in order, that two nested mappings differ in, with both values; None where they are equal."""
    first = next(differences(left, right, path), None)
    return None if first is None else f"{first.key} is {shortened(first.right)}, not {shortened(first.left)}"


def _plain(groups: Mapping[str, Any]) -> dict[str, list[str]]:
    return {folder: list(sections) for folder, sections in groups.items()}


def _share(manifest: Manifest) -> float:
    return float(manifest.corpus.get("held_out", 0.0))
