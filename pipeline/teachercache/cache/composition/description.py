"""The manifest of a composed cache: what its parents have in common, what was counted anew, and who they are.

Figures that were measured on all rows of a parent are kept where all of its rows are here, and left out where they are not.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from teachercache.cache.composition.placing import Placed
from teachercache.cache.composition.row_facts import Windows
from teachercache.cache.files.entries import FileInfo, ShardTable
from teachercache.cache.manifest.model import QUARANTINE, Audit, Manifest, cache_fingerprint
from teachercache.version import __version__

SOURCE_JOIN = " + "


def composed(
    parents: Sequence[Manifest], placed: Sequence[Placed], *, audit: Audit, files: Sequence[FileInfo],
    sources: Sequence[str], described: Sequence[dict[str, Any]], is_whole: bool,
) -> Manifest:  # fmt: skip
    """The manifest. `files` are those beside the shards, `sources` names the corpus that each shard came from, `described` are
    the entries of `parents`; `is_whole` says that every row of each parent is here, or one like it."""
    first = parents[0]
    sizes: Counter[str] = Counter()
    for item in placed:
        sizes.update(item.column_bytes)
    shards = ShardTable.of((item.shard for item in placed), groups=first.groups)
    corpus = {**_common(parents), "source": _joined(sources), "digest": content_digest(shards)}
    units = first.units if all(parent.units == first.units for parent in parents) else {}
    return replace(
        first,
        fingerprint=cache_fingerprint(first.settings_fingerprint, first.target_digests, corpus, units),
        corpus=corpus,
        units=units,
        audit=audit,
        shards=shards,
        files=list(files),
        column_bytes=dict(sizes),
        fidelity=_fidelity(parents) if is_whole else {},
        input_form=_input_form(parents),
        created_by=f"teachercache {__version__}",
        parents=tuple(described),
        sources=_runs(sources),
        index=(),
    )


def content_digest(shards: ShardTable) -> str:
    """`corpus.digest` of a composed cache: sha256 over the `row_ids` of its shards, 32 bytes each, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, shards.row_ids))).hexdigest()


def sources_of(manifest: Manifest) -> list[str]:
    """Name of the corpus that each shard came from."""
    if not manifest.sources:
        return [manifest.corpus["source"]] * len(manifest.shards)
    return [run["source"] for run in manifest.sources for _ in range(run["shards"])]


def merged_audit(parents: Sequence[Manifest], dropped: Windows) -> Audit:
    """The sum of the parents' audits; documents of which no row is left, because all came before, count as deduplicated."""
    sums: Counter[str] = Counter()
    for parent in parents:
        sums.update(vars(parent.audit))
    return Audit(
        rows_in=sums["rows_in"],
        stored=sums["stored"] - dropped.documents,
        quarantined=sums["quarantined"],
        deduplicated=sums["deduplicated"] + dropped.documents,
        windowed_documents=sums["windowed_documents"] - dropped.windowed,
        extra_windows=sums["extra_windows"] - (dropped.windows - dropped.documents),
        windows_without_targets=sums["windows_without_targets"],
        windows_quarantined=sums["windows_quarantined"],
    )


def chosen_audit(kept: Windows) -> Audit:
    """The audit of chosen rows: what they are of is all that there is."""
    return Audit(
        rows_in=kept.documents,
        stored=kept.documents,
        quarantined=0,
        deduplicated=0,
        windowed_documents=kept.windowed,
        extra_windows=kept.windows - kept.documents,
        windows_without_targets=0,
        windows_quarantined=0,
    )


def files_of_teacher(manifest: Manifest) -> list[FileInfo]:
    """The files that are no rows: those in teacher/."""
    return [info for info in manifest.files if not info.file.startswith(f"{QUARANTINE}/")]


def _common(parents: Sequence[Manifest]) -> dict[str, Any]:
    """Settings of the corpora that are the same in all of them; text is kept where all keep it."""
    first, *others = (parent.corpus for parent in parents)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    if "store_text" in first:
        shared["store_text"] = all(parent.corpus.get("store_text", True) for parent in parents)
    return {**shared, "held_out": first.get("held_out", 0.0)}


def _joined(sources: Iterable[str]) -> str:
    return SOURCE_JOIN.join(dict.fromkeys(sources))


def _runs(sources: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Neighbours of one source as one entry; none where there is only one source."""
    if len(set(sources)) < 2:
        return ()
    runs: list[dict[str, Any]] = []
    for source in sources:
        if runs and runs[-1]["source"] == source:
            runs[-1]["shards"] += 1
        else:
            runs.append({"source": source, "shards": 1})
    return tuple(runs)


def _fidelity(parents: Sequence[Manifest]) -> dict[str, Any]:
    """Means over all parents, weighted by how many positions each measured; {} where one measured nothing."""
    measured = [parent.fidelity for parent in parents]
    if not all(measured) or len({figures["tail"] for figures in measured}) > 1:
        return {}
    positions = sum(figures["positions"] for figures in measured)
    temperatures = [T for T in measured[0]["kl"] if all(T in figures["kl"] for figures in measured)]
    kl = {T: sum(f["kl"][T] * f["positions"] for f in measured) / max(1, positions) for T in temperatures}
    return {"positions": positions, "tail": measured[0]["tail"], "kl": kl}


def _input_form(parents: Sequence[Manifest]) -> dict[str, Any]:
    """That of a parent in which another form was better, else of the first one."""
    forms = [parent.input_form for parent in parents]
    return next((form for form in forms if form.get("better")), forms[0])
