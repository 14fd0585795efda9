"""From the records of finished units to a cache: audit, digests, card, and the manifest as the last step."""

from __future__ import annotations

from collections import Counter
from typing import Any

from teachercache.cache import Audit, FileInfo, Manifest, ShardInfo
from teachercache.cache.files.column_groups import layout_of
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import ShardTable
from teachercache.cache.manifest.card import render_card
from teachercache.cache.manifest.manifest import WORK_FOLDER, commit_manifest
from teachercache.cache.manifest.model import QUARANTINE, TEACHER_IDENTITY, cache_fingerprint
from teachercache.cache.stores.store import Store, place
from teachercache.cache.verify import CARD
from teachercache.errors import JobFailed
from teachercache.precompute.capture.plan import TEACHER, Plan, check_teacher_files, made_file
from teachercache.version import __version__


def commit(plan: Plan) -> Manifest:
    """Commit the cache. Raises `JobFailed` when rows are unaccounted for, a unit is missing, or nothing was stored."""
    records = [record for _, record in sorted(plan.records().finished().items())]
    if len(records) < plan.units:
        missing = plan.units - len(records)
        raise JobFailed(f"{missing} of {plan.units} units have no result; run the same command again to do them")
    manifest = _manifest(plan, records)
    if not manifest.shards:
        raise JobFailed(
            f"all {plan.rows_in} rows were quarantined, so there is nothing to store; "
            f"their reasons are in {place(plan.store, QUARANTINE)}"
        )
    plan.store.put(CARD, render_card(manifest).encode())
    _remove_leftovers(plan, manifest)
    commit_manifest(manifest, plan.store)
    remove_work(plan.store)
    return manifest


def remove_work(store: Store) -> None:
    """Remove what the job worked with, once the manifest is there: plan, units of the corpus, records."""
    store.delete(*store.list(f"{WORK_FOLDER}/"))
    store.sweep()


def _manifest(plan: Plan, records: list[dict[str, Any]]) -> Manifest:
    column_bytes: Counter[str] = Counter()
    for record in records:
        column_bytes.update(record["column_bytes"])
    quarantine = [FileInfo(**record["quarantine"]) for record in records if record["quarantine"]]
    model, identity, layout = _loaded_teacher(records), plan.identity, layout_of(plan.targets)
    settings, digests = plan.settings(model["dtype"]), plan.target_digests()
    settings_fingerprint = fingerprint_of(settings)
    return Manifest(
        fingerprint=cache_fingerprint(settings_fingerprint, digests, identity["corpus"], identity["units"]),
        settings_fingerprint=settings_fingerprint,
        settings=settings,
        target_digests=digests,
        groups=layout,
        described_teacher={key: value for key, value in identity["teacher"].items() if key not in TEACHER_IDENTITY},
        model=model,
        **{key: identity[key] for key in ("targets", "corpus", "units")},
        audit=_audit(plan, records),
        shards=ShardTable.of((ShardInfo.from_json(r["shard"]) for r in records if r["shard"]), groups=layout),
        files=[*_teacher_files(plan), *quarantine],
        column_bytes=dict(column_bytes),
        read_by=plan.read_by(),
        calibration={name: value for name, value in (plan.calibration() or {}).items() if name not in _OF_THE_JOB},
        input_form=plan.input_form(),
        fidelity=_fidelity(records, drifts=plan.targets.logits.needs_calibration),
        created_by=f"teachercache {__version__}",
    )


def _loaded_teacher(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the actors loaded. Raises `JobFailed` where they did not load the same; libraries and kernels are
    noted alone."""
    model: dict[str, Any] = records[-1]["teacher"]
    differs = [key for key, default in _LOADED.items() if len({r["teacher"].get(key, default) for r in records}) > 1]
    if differs:
        raise JobFailed(
            f"units were computed by teachers that were loaded differently ({', '.join(differs)}); set teacher.dtype and "
            "teacher.backend, delete the cache's folder and run again"
        )
    return model


def _teacher_files(plan: Plan) -> list[FileInfo]:
    """Those that the job wrote, as it wrote them; whatever else lies there is none of the cache's."""
    check_teacher_files(plan)
    files = [made_file(plan.store, name) for name in plan.made_files()]
    return sorted([*(FileInfo(**info) for info in plan.files), *files], key=lambda info: info.file)


def _audit(plan: Plan, records: list[dict[str, Any]]) -> Audit:
    total = Counter({name: sum(record[name] for record in records) for name in _COUNTED})
    planned = plan.rows_in - plan.deduplicated
    if total["documents"] != planned:
        raise JobFailed(
            f"{planned} rows were planned, but units account for {total['documents']}; delete {plan.store.name} and run again"
        )
    return Audit(
        rows_in=plan.rows_in,
        stored=planned - total["quarantined_documents"],
        quarantined=total["quarantined_documents"],
        deduplicated=plan.deduplicated,
        windowed_documents=total["windowed_documents"],
        extra_windows=total["extra_windows"],
        windows_without_targets=total["windows_without_targets"],
        windows_quarantined=total["windows_quarantined"],
    )


def _fidelity(records: list[dict[str, Any]], *, drifts: bool) -> dict[str, Any]:
    """KL(teacher ‖ stored) measured while capturing: means over all units; where a basis can drift, units that stand out."""
    units = [(unit, record["fidelity"]) for unit, record in enumerate(records) if record.get("fidelity")]
    if not units:
        return {}
    positions = sum(measured["positions"] for _, measured in units)
    temperatures = [T for T in units[0][1]["kl"] if all(T in measured["kl"] for _, measured in units)]
    kl = {T: sum(measured["kl"][T] for _, measured in units) / max(1, positions) for T in temperatures}
    fidelity = {"positions": positions, "tail": units[0][1]["tail"], "kl": kl}
    if not drifts or DRIFT_AT not in kl:
        return fidelity
    worse = [
        {"unit": unit, "positions": measured["positions"], "kl": measured["kl"][DRIFT_AT] / measured["positions"]}
        for unit, measured in units
        if measured["positions"] >= DRIFT_POSITIONS
        and measured["kl"][DRIFT_AT] / measured["positions"] > DRIFT_FACTOR * kl[DRIFT_AT]
    ]
    return {**fidelity, "drifting_units": worse}


_OF_THE_JOB = ("read_by", "dtype", "job")  # of the record of calibration
# What one cache may not mix, and what records of earlier versions mean that do not say it.
_LOADED = {"architecture": None, "parameters": None, "dtype": None, "backend": "transformers"}
DRIFT_AT = "2"  # temperature
DRIFT_FACTOR = 2.0
DRIFT_POSITIONS = 20  # measured ones, below which a unit's mean says little

_COUNTED = (
    "documents",
    "quarantined_documents",
    "windowed_documents",
    "extra_windows",
    "windows_without_targets",
    "windows_quarantined",
)


def _remove_leftovers(plan: Plan, manifest: Manifest) -> None:
    """Files of writers that were killed or came second: everything in the data folders that no record names."""
    listed = {info.file for info in manifest.all_files}
    folders = (*manifest.groups, QUARANTINE, TEACHER)
    others = [name for name in plan.store.list() if name.startswith(tuple(f"{folder}/" for folder in folders))]
    plan.store.delete(*(name for name in others if name not in listed))
