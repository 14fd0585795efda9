"""Calibration that another cache has done: a job takes its basis and layer files, so that shards of both may stand in one.

Codes of two caches mean the same numbers only where the same files read them. The files are those that the other cache's
manifest names in `read_by`, their bytes checked; nothing is fitted then, and the corpus's own sample is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from teachercache.cache import Cache, Manifest
from teachercache.cache.composition.compatible import check_same_files, check_version, first_difference
from teachercache.cache.files.bounds import MOST_CALIBRATION_BYTES
from teachercache.cache.storage.source import read_checked
from teachercache.errors import CacheError
from teachercache.precompute.capture.plan import CALIBRATION_FILE, Plan, settings_of

KEY = "targets.calibration_from"
AUTO = "auto"


def take_calibration(plan: Plan, location: str) -> None:
    """Give an unfinished job the files that the cache at `location` reads its targets by, with the record of them; nothing
    is done where it has them, or its targets need none.

    Raises `CacheError`, which names the first key that differs, for a cache of another teacher, tokenizer, sequence or
    targets, and for a job that was calibrated otherwise.
    """
    source = Cache.open(location)
    check_version(source.manifest, name=source.name)
    _check_settings(plan, source.manifest, name=source.name)
    if not plan.targets.needs_preparation:
        return
    known = plan.calibration()
    if known is None:
        _copy_files(plan, source)
        plan.store.put(CALIBRATION_FILE, json.dumps(_record(source.manifest), sort_keys=True).encode())
    elif known["read_by"] != source.manifest.read_by:
        raise CacheError(
            f"the job in {plan.store.name} was begun with another calibration than that of {source.name} ({KEY}); delete "
            f"{plan.store.name} to start over, or leave the key as it was"
        )


def check_calibration(manifest: Manifest, location: str, *, name: str) -> None:
    """Raise `CacheError` where the finished cache `name` was calibrated otherwise than the cache at `location`."""
    source = Cache.open(location)
    check_version(source.manifest, name=source.name)
    check_same_files(source.manifest, manifest, name=source.name, of=name)


def check_loaded(plan: Plan, described: Mapping[str, Any]) -> None:
    """Raise `CacheError` where the teacher was loaded in another precision than that of the cache whose calibration the job
    has taken: what follows from `dtype: auto` is known no earlier."""
    wanted = (plan.calibration() or {}).get("dtype")
    if wanted is not None and described["dtype"] != wanted:
        raise CacheError(
            f"the teacher is loaded in {described['dtype']}, that of the cache in {KEY} was in {wanted}; set teacher.dtype: "
            f"{wanted}, and delete {plan.store.name}"
        )


def settings_beside(identity: Mapping[str, Any], other: Manifest) -> dict[str, Any]:
    """The settings and targets of a job as those of a finished cache stand in its manifest. With `dtype: auto` the teacher is
    taken to be loaded as that of the cache was: `check_loaded` says more."""
    asked = identity["teacher"]["dtype"]
    dtype = other.settings["teacher"]["dtype"] if asked == AUTO else asked
    beside: dict[str, Any] = json.loads(
        json.dumps({"settings": settings_of(identity, dtype), "targets": identity["targets"]})
    )
    return beside


def _check_settings(plan: Plan, other: Manifest, *, name: str) -> None:
    known: dict[str, Any] = {"settings": other.settings, "targets": other.targets}
    if difference := first_difference(known, settings_beside(plan.identity, other)):
        raise CacheError(
            f"this recipe cannot take the calibration of {name} ({KEY}), which has other settings: {difference}; make them "
            "equal, or leave the key out"
        )


def _copy_files(plan: Plan, source: Cache) -> None:
    listed = {info.file: info for info in source.manifest.files}
    for name in sorted({name for files in source.manifest.read_by.values() for name in files.values()}):
        plan.store.put(name, read_checked(source.source, listed[name], most=MOST_CALIBRATION_BYTES))


def _record(other: Manifest) -> dict[str, Any]:
    """As `units.calibrate` writes it: the sample that the files were fitted to; `from` names the cache."""
    return {
        "positions": 0,
        "rows": [],
        "sources": [],
        **other.calibration,
        "read_by": other.read_by,
        "from": other.fingerprint,
        "dtype": other.settings["teacher"]["dtype"],
    }
