"""Caches of any size without a teacher: what is slow about reading does not depend on what the numbers mean.

Tokens and heads follow Zipf's law, logits have the spacings of an exponential tail, sketch coefficients fall in spread from
the first direction to the last. Everything follows from the seed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache import __version__
from teachercache.cache.files.column_groups import groups_of, layout_of, target_digests
from teachercache.cache.files.digests import fingerprint_of, hash_file
from teachercache.cache.files.entries import ShardTable, file_info
from teachercache.cache.manifest.manifest import commit_manifest
from teachercache.cache.manifest.model import Audit, Manifest, cache_fingerprint
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.stores.local import LocalStore
from teachercache.config import HeadSketchConfig
from teachercache.targets import StoredTargets, TargetKind, target_kind
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.tail import NODES
from teachercache.tokens.rows import Segment, TokenRow, row_id

V, HEAD, TEMPERATURES = 49152, 64, (1.0, 2.0, 4.0, 8.0)
ROWS_PER_SHARD = 1024  # as precompute.unit_rows
WORDS = ("the model reads a row of tokens and asks what the teacher would have said about each " * 12).split()

Arrays = dict[str, NDArray[Any]]


def rows(count: int, *, length: int) -> Iterator[TokenRow]:
    """Rows of so many tokens with their text, each token but the last a position."""
    generator = np.random.default_rng(0)
    mask_S = np.arange(length) < length - 1
    for number in range(count):
        text = " ".join(generator.permutation(WORDS))[: 4 * length]
        segment = Segment(hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest(), 0, 0, len(text), 0, text)
        yield TokenRow(row_id([segment]), False, _tokens(generator, (length,)).astype(np.int32), mask_S, (segment,))


def top_k_arrays(positions: int, *, seed: int) -> Arrays:
    """Arrays as a teacher's capture gives them for kind `top-k`."""
    generator = np.random.default_rng([1, seed])
    gaps_Nk = generator.exponential(size=(positions, HEAD - 1)) * 4 / np.arange(1, HEAD)
    logits_Nk = np.concatenate([np.zeros((positions, 1)), -np.cumsum(gaps_Nk, axis=1)], axis=1)
    tail_NG = generator.normal([0.0, 5.0, 8.0, 9.5], [1.5, 0.8, 0.4, 0.2], size=(positions, len(TEMPERATURES)))
    return {
        "head_ids": _distinct_tokens(generator, positions),
        "head_logits": logits_Nk.astype(np.float16),
        "tail_log_partition": tail_NG.astype(np.float16),
        "actual_log_prob": -generator.exponential(3.0, size=positions).astype(np.float16),
    }


def top_k_cache(folder: Path, *, count: int, length: int) -> None:
    """A cache of kind `top-k` with k = 64."""
    settings = {"kind": "top-k", "k": HEAD, "temperatures": list(TEMPERATURES), "dtype": "float16"}
    kind = target_kind(settings, vocabulary_size=V)
    _write(folder, kind, count=count, length=length, payload=lambda row, seed: top_k_arrays(row.positions, seed=seed))


def sketch_cache(folder: Path, *, count: int, length: int) -> None:
    """A cache of the default kind, preset compact."""
    settings = HeadSketchConfig.model_validate({})
    basis = _basis(np.random.default_rng(2), k=settings.k, rank=settings.rank)
    (folder / "teacher").mkdir(parents=True)
    path = basis.save(folder / "teacher")
    kind = target_kind(settings.model_dump(exclude={"preset"}), vocabulary_size=V, basis=path)
    spread_r = 2 * np.exp(-np.arange(settings.rank) / (settings.rank / 8)) + 0.02

    def payload(row: TokenRow, seed: int) -> Arrays:
        generator, captured = np.random.default_rng([3, seed]), top_k_arrays(row.positions, seed=seed)
        return kind.finish(
            {
                "head_ids": captured["head_ids"][:, : settings.k],
                "head_logits": captured["head_logits"][:, : settings.k].astype(np.float32),
                "tail_nodes": generator.normal(np.log(NODES) * 4, 1.0, size=(row.positions, len(NODES))),
                "coefficients": generator.normal(0, spread_r, size=(row.positions, settings.rank)).astype(np.float32),
                "actual_log_prob": captured["actual_log_prob"],
            }
        )

    _write(folder, kind, count=count, length=length, payload=payload, basis=path)


def _tokens(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return (generator.zipf(1.2, size=shape) * 7919) % V


def _distinct_tokens(generator: np.random.Generator, positions: int) -> NDArray[np.uint16]:
    """[N, k]: frequent tokens often; what would occur twice at a position is replaced by any other token."""
    ids_Nk = np.sort(_tokens(generator, (positions, HEAD)), axis=1)
    while (twice_Nk := ids_Nk[:, 1:] == ids_Nk[:, :-1]).any():
        ids_Nk[:, 1:][twice_Nk] = generator.integers(0, V, size=int(twice_Nk.sum()))
        ids_Nk.sort(axis=1)
    return generator.permuted(ids_Nk, axis=1).astype(np.uint16)


def _basis(generator: np.random.Generator, *, k: int, rank: int) -> SketchBasis:
    return SketchBasis(
        mean_D=np.zeros(rank, np.float32),
        analysis_Dr=np.eye(rank, dtype=np.float32),
        basis_Vr=generator.normal(size=(V, rank)).astype(np.float16),
        base_V=np.zeros(V, np.float32),
        bias_constant_V=np.zeros(V, np.float16),
        bias_slope_V=np.zeros(V, np.float16),
        token_of_rank_V=generator.permutation(V).astype(np.uint32),
        tail_weights_GF=np.zeros((len(NODES), k + len(NODES)), np.float32),
    )


def _write(folder: Path, kind: TargetKind, *, count: int, length: int, payload: Any, basis: Path | None = None) -> None:
    settings = {
        "teacher": {"dtype": "float32"},
        "tokenizer": {"fingerprint": "none", "vocabulary_size": V, "pad_id": 0, "eos_id": 0},
        "sequence": {"layout": "documents", "length": length},
    }
    fingerprint = fingerprint_of(settings)
    targets, corpus, units = (
        {"logits": kind.settings()},
        {"source": "synthetic", "rows": count},
        {"rows": ROWS_PER_SHARD},
    )
    read_by = {} if basis is None else {"logits": {"basis": basis.relative_to(folder).as_posix()}}
    digests = target_digests(targets, {} if basis is None else {"logits": {"basis": hash_file(basis)}})
    stored = StoredTargets(kind)
    layout = layout_of(stored)
    groups = groups_of(stored, layout=layout, settings=fingerprint, digests=digests, read_by=read_by)
    made = list(rows(count, length=length))
    shards, column_bytes = [], Counter[str]()
    for start in range(0, count, ROWS_PER_SHARD):
        part = made[start : start + ROWS_PER_SHARD]
        arrays = [payload(row, start + index) for index, row in enumerate(part)]
        info, sizes = write_shard(LocalStore(folder), start // ROWS_PER_SHARD, rows=part, payload=arrays, groups=groups)
        shards.append(info)
        column_bytes.update(sizes)
    manifest = Manifest(
        fingerprint=cache_fingerprint(fingerprint, digests, corpus, units),
        settings_fingerprint=fingerprint,
        settings=settings,
        targets=targets,
        target_digests=digests,
        groups=layout,
        described_teacher={"model": "none"},
        model={},
        corpus=corpus,
        units=units,
        audit=Audit(count, count, 0, 0, 0, 0, 0, 0),
        shards=ShardTable.of(shards),
        files=[] if basis is None else [file_info(folder, basis)],
        column_bytes=dict(column_bytes),
        read_by=read_by,
        created_by=f"teachercache {__version__}",
    )
    commit_manifest(manifest, LocalStore(folder))
