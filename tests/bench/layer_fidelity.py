"""Fidelity of stored layers, and the bytes that they take: hidden states by codec and step, attention by kind.

    python tests/bench/layer_fidelity.py [--teacher ID] [--length 256] [--positions 4096] [--calibration 4096]
                                         [--hidden 0 8 15 22 29] [--attention 9 16 23 30]
                                         [--lengths 128 256 512 1024 2048] [--out FILE] [--json]

Rows are windows of CPython's documentation in the order of a salted hash: the first for calibration, the next ones for
measuring. Bytes are those of a token's columns under their codec and zstd, tables included. Cosines and KL are those of
`teachercache fidelity` (first tokens of rows left out); `worst` is the 1 % quantile of a token's cosine. The full square that
attention is held against is heads × length numbers of 16 bits a token. `by_length` has the default codecs, for the first of
the attention layers, on rows of other lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from codec_fidelity import TEACHER, _rows, _until
from provenance import add_output_options, provenance, publish
from torch.nn.functional import cosine_similarity

from teachercache.cache import StoredRow
from teachercache.evaluation.layer_fidelity import attention_divergence
from teachercache.models.activations import recorded
from teachercache.models.loading import load_causal_lm, load_tokenizer, model_inputs
from teachercache.targets import HiddenStates, StoredTargets, TopK
from teachercache.targets.layers.attention_maps import AttentionMaps
from teachercache.targets.layers.attention_relations import Relations
from teachercache.targets.layers.attention_vectors import QueriesKeys
from teachercache.targets.layers.hidden_states import HIDDEN_STEPS
from teachercache.teacher.layers import LayerSample, attention_file, make_layer_files, rows_of
from teachercache.tokens.rows import TokenRow

STEPS = {"int8": (0.06, 0.08, 0.11, 0.16), "projected": (0.3, 0.45, 0.6, 0.8), "bf16": (0.0,)}
FACTOR_STEPS = (0.03, 0.05, 0.11)
ZSTD = pa.Codec("zstd", compression_level=3)  # that of shards
CALIBRATION = {"calibration_positions": 2**30}


class Bench:
    """A teacher, what its layers hold at the rows, and a sample."""

    def __init__(self, options: argparse.Namespace, *, length: int, attention: Sequence[int]) -> None:
        self.model: Any = load_causal_lm(options.teacher, dtype="float32").eval()
        tokenizer = load_tokenizer(options.teacher)
        text, self.length = self.model.config.get_text_config(), length
        self.hidden, self.attention = tuple(options.hidden), tuple(attention)
        self.sizes = {"width": text.hidden_size, "blocks": text.num_hidden_layers}
        self.heads = {
            "heads": text.num_attention_heads,
            "key_heads": text.num_key_value_heads,
            "head_width": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        }
        self.logits, self.pad_id = TopK(1, (1.0,), "float32", len(tokenizer)), tokenizer.eos_token_id or 0
        rows = _rows(tokenizer, length=length)
        self.sample_rows = _until(rows, options.calibration)
        self.rows = _until(rows[len(self.sample_rows) :], options.positions)
        entered = [layer - 1 for layer in self.attention]
        self.layers = tuple(sorted({*self.hidden, *entered}))
        self.exact = [self.observe(row) for row in self.rows]
        self.sample = self._sample()

    @torch.inference_mode()
    def observe(self, row: TokenRow) -> Any:
        with recorded(self.model, hidden=self.layers, attention=self.attention) as activations:
            self._run(row)
        return rows_of(activations, [row], layout="documents")[0]

    def _run(self, row: TokenRow) -> None:
        inputs = model_inputs([row], pad_id=self.pad_id, layout="documents")
        self.model.base_model(**{name: torch.from_numpy(values) for name, values in inputs.items()}, use_cache=False)

    @torch.inference_mode()
    def _sample(self) -> LayerSample:
        every = HiddenStates(layers=self.layers, **self.sizes, codec="int8", step=1.0, **CALIBRATION)
        factors = QueriesKeys(layers=self.attention, **self.heads, **self.sizes, step=1.0, **CALIBRATION)
        sample = LayerSample(StoredTargets(self.logits, every, factors))
        for row in self.sample_rows:
            with recorded(self.model, hidden=self.layers, attention=self.attention) as activations:
                self._run(row)
            sample.add(rows_of(activations, [row], layout="documents"))
        return sample

    def targets(self, **kinds: Any) -> StoredTargets:
        targets = StoredTargets(self.logits, **kinds)
        made = make_layer_files(partial(attention_file, self.model), targets, self.sample, longest=self.length)
        for section, layers in made.items():
            targets = targets.with_layer_file(section, layers, longest=self.length)
        return targets

    def stored(self, kind: Any) -> tuple[list[dict[str, Any]], float]:
        """Columns of each row as a reader gets them, and bytes of a token."""
        captured = [kind.capture(torch, exact) for exact in self.exact]
        size, read = 0, [dict[str, Any]() for _ in captured]
        for column in kind.columns:
            tables, pages = column.encode([columns[column.name] for columns in captured])
            size += len(tables) + sum(len(ZSTD.compress(page)) for page in pages if page)
            decode = column.decoder(tables)
            for into, page, row in zip(read, pages, self.rows, strict=True):
                into[column.name] = decode(page, row.pairs if column.of == "pair" else row.length)
        return read, size / sum(row.length for row in self.rows)

    def hidden_states(self, layer: int, codec: str, step: float) -> dict[str, float]:
        kind = HiddenStates(layers=(layer,), **self.sizes, codec=codec, step=step, **CALIBRATION)
        targets = self.targets(hidden=kind)
        assert targets.hidden is not None and targets.hidden.layer_file is not None
        read, size = self.stored(targets.hidden)
        mean_D = torch.from_numpy(targets.hidden.layer_file.arrays[f"hidden.{layer}.mean"])
        raw, centred = [], []
        for exact, columns in zip(self.exact, read, strict=True):
            pair = (exact.hidden[layer][1:], torch.from_numpy(targets.decoded(columns)[f"hidden_{layer}"])[1:])
            raw.append(cosine_similarity(*(each.double() for each in pair), dim=-1))
            centred.append(cosine_similarity(*((each - mean_D).double() for each in pair), dim=-1))
        return {
            "bytes_per_channel": round(size / self.sizes["width"], 4),
            "cosine": round(float(torch.cat(raw).mean()), 6),
            "worst": round(float(torch.cat(raw).quantile(0.01)), 6),
            "cosine_centred": round(float(torch.cat(centred).mean()), 6),
        }

    def attention_of(self, layer: int, kind: Any, hidden: HiddenStates | None = None) -> dict[str, float]:
        targets = self.targets(attention=kind, **({} if hidden is None else {"hidden": hidden}))
        rows, size = [dict[str, Any]() for _ in self.rows], 0.0
        for each in targets.layers:
            if each.columns:
                read, bytes_each = self.stored(each)
                size += bytes_each
                for into, columns in zip(rows, read, strict=True):
                    into.update(columns)
        divergences = [
            attention_divergence(targets, layer, StoredRow(row, columns), exact)[1:]
            for row, exact, columns in zip(self.rows, self.exact, rows, strict=True)
        ]
        square = 2 * self.heads["heads"] * self.length
        return {
            "bytes": round(size, 1),
            "of_full_square": round(size / square, 4),
            "kl": float(f"{torch.cat(divergences).mean():.3g}"),
        }


def measure(bench: Bench) -> dict[str, Any]:
    hidden = {
        f"{codec} {step:g}" if step else codec: {
            str(layer): bench.hidden_states(layer, codec, step) for layer in bench.hidden
        }
        for codec, steps in STEPS.items()
        for step in steps
    }
    attention: dict[str, Any] = {}
    for layer in bench.attention:
        shared = {"layers": (layer,), **bench.heads, **bench.sizes}
        for codec, steps in STEPS.items():
            for step in steps:
                states = HiddenStates(layers=(layer - 1,), **bench.sizes, codec=codec, step=step, **CALIBRATION)
                name = f"relations of {codec} {step:g}" if step else f"relations of {codec}"
                found = bench.attention_of(layer, Relations(**shared), states)
                attention.setdefault(name, {})[str(layer)] = found
        for step in FACTOR_STEPS:
            found = bench.attention_of(layer, QueriesKeys(**shared, step=step, **CALIBRATION))
            attention.setdefault(f"queries-keys {step:g}", {})[str(layer)] = found
        maps = AttentionMaps(**shared, teacher_heads=shared["heads"], longest=bench.length)
        attention.setdefault("maps", {})[str(layer)] = bench.attention_of(layer, maps)
    return {"hidden": with_means(hidden), "attention": with_means(attention)}


def by_length(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layer = options.attention[0]
    for length in options.lengths:
        bench = Bench(options, length=length, attention=[layer])
        shared = {"layers": (layer,), **bench.heads, **bench.sizes}
        states = HiddenStates(
            layers=(layer - 1,), **bench.sizes, codec="int8", step=HIDDEN_STEPS["int8"], **CALIBRATION
        )
        found[str(length)] = {
            "relations": bench.attention_of(layer, Relations(**shared), states),
            "queries-keys": bench.attention_of(layer, QueriesKeys(**shared, step=FACTOR_STEPS[0], **CALIBRATION)),
            "maps": bench.attention_of(layer, AttentionMaps(**shared, teacher_heads=shared["heads"], longest=length)),
        }
    return found


def with_means(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each arm's figures by layer, and their means."""
    return {
        name: {**by, "mean": {key: float(f"{np.mean([each[key] for each in by.values()]):.6g}") for key in first(by)}}
        for name, by in table.items()
    }


def first(by: dict[str, dict[str, float]]) -> Sequence[str]:
    return list(next(iter(by.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    for name, value in (("length", 256), ("positions", 4096), ("calibration", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--hidden", type=int, nargs="+", default=[0, 8, 15, 22, 29])
    parser.add_argument("--attention", type=int, nargs="+", default=[9, 16, 23, 30])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    add_output_options(parser)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("teacher", "length", "positions", "calibration")}
    found = measure(Bench(options, length=options.length, attention=options.attention))
    publish({**provenance(), **settings, **found, "by_length": by_length(options)}, options)


if __name__ == "__main__":
    main()
