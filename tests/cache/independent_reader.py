"""A reader of format 2 by FORMAT.md alone: the standard library, numpy, pyarrow and pcodec, nothing of this project.

It checks every digest and fingerprint that the text defines, reads rows with all of their columns, and makes
log-probabilities of logits of kind `top-k`, as somebody who writes a reader in another language would.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pcodec import wrapped

Json = dict[str, Any]
Array = NDArray[Any]


def check(right: object, what: str) -> None:
    """Raise `ValueError` where something is not as FORMAT.md says."""
    if not right:
        raise ValueError(what)


# Canonical JSON, written out: what a language without Python's `json` has to do.


def canonical(value: Any) -> str:
    """FORMAT.md, "Canonical JSON"."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{quoted(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int) else number(value)


SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b"}


def quoted(text: str) -> str:
    """A string: control characters and the two signs of JSON are escaped, nothing else."""
    return '"' + "".join(SHORT.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in text) + '"'


def ascii_only(text: str) -> str:
    """Canonical JSON of tokenizers and templates: what is not printable ASCII stands there as UTF-16 units."""
    units = [c if c < "\x7f" else c.encode("utf-16-be") for c in text]
    return "".join(
        each if isinstance(each, str) else "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", each))
        for each in units
    )


def number(value: float) -> str:
    """A float: the fewest digits that give it back, with a point or an exponent."""
    digits, exponent = shortest(abs(value))
    sign = "-" if np.signbit(value) else ""
    if not -4 <= exponent < 16:
        fraction = f".{digits[1:]}" if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{fraction}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole = digits[: exponent + 1].ljust(exponent + 1, "0")
    return f"{sign}{whole}.{digits[exponent + 1 :] or '0'}"


def shortest(value: float) -> tuple[str, int]:
    """The fewest significant digits that give a number back, and the power of ten of the first one."""
    for count in range(17):
        mantissa, _, exponent = f"{value:.{count}e}".partition("e")
        if float(f"{mantissa}e{exponent}") == value:
            return mantissa.replace(".", "").rstrip("0") or "0", int(exponent)
    raise ValueError("NaN and infinities have no JSON")


def sha256(data: bytes | str) -> str:
    """In hex digits."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def digest_of(value: Any) -> str:
    """sha256 over the canonical JSON."""
    return sha256(canonical(value))


# The fingerprints.

MEMBERS = {  # known members of tokenizer.json: with a default, or (None in the second set) without
    "model": {
        "BPE": (
            "vocab merges",
            {
                **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
                **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            },
        ),
    },
    "normalizer": {},
    "pre_tokenizer": {"ByteLevel": ("", dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), True))},
    "post_processor": {
        "ByteLevel": ("", dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), True)),
        "TemplateProcessing": ("single pair special_tokens", {}),
    },
}
TOKEN = ("id content normalized special", dict.fromkeys(("single_word", "lstrip", "rstrip"), False))


def members(written: Json, required: str, defaults: Json) -> Json:
    """Known members with their defaults, and unknown ones that say something."""
    silent = (None, False, "", [], {})
    known = {"type", *required.split(), *defaults}
    said = {
        key: value
        for key, value in written.items()
        if key in known or not any(type(value) is type(each) and value == each for each in silent)
    }
    return {**defaults, **said}


def tokenizer_fingerprint(folder: Path) -> str:
    """FORMAT.md, "Fingerprint of a tokenizer"; of models of type BPE, which golden caches have."""
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = sorted(described["added_tokens"], key=lambda token: token["id"])
    hashed: Json = {"added_tokens": [members(token, *TOKEN) for token in added]}
    for name, types in MEMBERS.items():
        step = described.get(name)
        check(step is None or step["type"] in types, f"this reader knows no {name} of this type")
        hashed[name] = None if step is None else members(step, *types[step["type"]])
    model = hashed["model"]
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    names = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk")]
    texts = [name["content"] if isinstance(name, dict) else name for name in names]
    unknown = ids.get(texts[2])
    hashed["begin_end_unknown"] = [None if text is None else ids.get(text, unknown) for text in texts]
    hashed["split_special_tokens"] = settings.get("split_special_tokens", False)
    return sha256(ascii_only(canonical(hashed)))


def weights_sha256(folder: Path) -> str:
    """FORMAT.md, `weights_sha256`, of a model's folder."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")], key=lambda path: path.name)
    return sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in [*files, folder / "config.json"]))


def row_id(segments: Iterable[Json]) -> str:
    """FORMAT.md, `row_id`."""
    lines = [f"{s['source_id']}:{s['byte_start']}:{s['byte_end']}:{s['occurrence']}" for s in segments]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def is_held_out(source_id: str, share: float) -> bool:
    """FORMAT.md, "held out"."""
    return int(source_id[16:], 16) < share * 2**64


def corpus_digest(texts: Iterable[str]) -> str:
    """FORMAT.md, `corpus.digest`, of different usable texts."""
    ids = (hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts)
    return sha256("".join(f"{source_id} 0 None\n" for source_id in ids))


# Columns.


@dataclass(frozen=True)
class Column:
    """As the metadata of a file describes it."""

    said: Json

    def entries(self, counts: dict[str, int]) -> int:
        """Decodes a row with so many positions, tokens and pairs."""
        return -(-counts[self.said.get("of", "position")] // self.said.get("every", 1))

    def decoded(self, data: bytes, counts: dict[str, int]) -> Array:
        """A row's values, [entries, *shape]."""
        dtype, ragged = np.dtype(self.said["dtype"]), self.said.get("ragged", False)
        width = int(np.prod(self.said["shape"]))
        if self.said["codec"] == "plain/1":
            values = np.frombuffer(data, dtype)
            entries = len(values) // width if ragged else self.entries(counts)
        else:
            check(self.said["codec"] == "pco/1", "an unknown codec")
            entries = self.entries(counts)
            if ragged:
                (entries,), data = struct.unpack_from("<I", data), data[4:]
            values = self._pages(data, entries, dtype)
        return values.reshape(entries, *self.said["shape"])

    def _pages(self, data: bytes, entries: int, dtype: np.dtype[Any]) -> Array:
        tables = base64.b64decode(self.said["tables"])
        (size,) = struct.unpack_from("<I", tables)
        decompressor, _ = wrapped.FileDecompressor.new(tables[4 : 4 + size])
        at, parts = 4 + size, []
        while at < len(tables) and entries:
            group, size = struct.unpack_from("<II", tables, at)
            chunk, _ = decompressor.chunk_decompressor(
                tables[at + 8 : at + 8 + size], f"{dtype.kind}{8 * dtype.itemsize}"
            )
            page = np.empty(group * entries, dtype)
            _, read = chunk.read_page_into(data, group * entries, page)
            data, at = data[read:], at + 8 + size
            parts.append(page.reshape(group, entries))
        return np.concatenate(parts).T.copy() if parts else np.empty(0, dtype)


# The cache.


class IndependentCache:
    """A cache in a folder; `checked` holds every file and number against its digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Json = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        check(self.manifest["format"] == "teachercache" and self.manifest["format_version"] == 2, "another format")
        check(not self.manifest["requires"], "it requires what this reader does not know")
        self.index = [json.loads(self._bytes(entry)) for entry in self.manifest["index"]]

    def _bytes(self, info: Json) -> bytes:
        data = (self.folder / info["file"]).read_bytes()
        check(len(data) == info["bytes"] and sha256(data) == info["sha256"], f"{info['file']} is damaged")
        return data

    def shards(self) -> Iterator[Json]:
        """Every shard: its counts, `row_ids`, and `files` by column group."""
        for part in self.index:
            table = part["shards"]
            for number in range(len(table["rows"])):
                files = {
                    group: {key: values[number] for key, values in lists.items()}
                    for group, lists in table["files"].items()
                }
                yield {**{key: table[key][number] for key in table if key != "files"}, "files": files}

    def checked(self) -> None:
        """Raise `ValueError` for a digest or fingerprint that is not as FORMAT.md says."""
        manifest = self.manifest
        unsigned = {key: value for key, value in manifest.items() if key not in ("format", "digest")}
        check(digest_of(unsigned) == manifest["digest"], "the manifest's digest")
        check(digest_of(manifest["settings"]) == manifest["settings_fingerprint"], "settings_fingerprint")
        sums = {info["file"]: sha256(self._bytes(info)) for info in manifest["files"]}
        for section, settings in manifest["targets"].items():
            read_by = {role: sums[file] for role, file in manifest["read_by"].get(section, {}).items()}
            said = {"target": section, "settings": settings, "read_by": read_by}
            check(digest_of(said) == manifest["target_digests"][section], f"the digest of {section}")
        corpus = {key: value for key, value in manifest["corpus"].items() if key != "source"}
        named = {"settings": manifest["settings_fingerprint"], "targets": manifest["target_digests"]}
        whole = {**named, "corpus": corpus, "units": manifest["units"]}
        check(digest_of(whole) == manifest["fingerprint"], "fingerprint")
        said = manifest["settings"]["tokenizer"]["fingerprint"]
        check(tokenizer_fingerprint(self.folder / "teacher") == said, "the tokenizer's fingerprint")
        for name, total in manifest["totals"].items():
            check(total == self._total(name), f"totals.{name}")

    def _total(self, name: str) -> int:
        if name == "shards":
            return len(list(self.shards()))
        if name == "bytes":
            return sum(info["bytes"] for shard in self.shards() for info in shard["files"].values())
        return sum(shard[name] for shard in self.shards())

    def rows(self) -> Iterator[tuple[Json, dict[str, Array]]]:
        """Every row, shard after shard, with its decoded columns of all groups."""
        for shard in self.shards():
            yield from self._rows_of(shard)

    def _rows_of(self, shard: Json) -> Iterator[tuple[Json, dict[str, Array]]]:
        tables = {group: self._table(group, info) for group, info in shard["files"].items()}
        ids = {group: table.column("row_id").to_pylist() for group, (table, _) in tables.items()}
        named = ids["shards"]
        check(all(each == named for each in ids.values()), "groups of one shard hold other rows")
        check(sha256(b"".join(map(bytes.fromhex, named))) == shard["row_ids"], "row_ids")
        stored = [tables["shards"][0].slice(number, 1).to_pylist()[0] for number in range(shard["rows"])]
        check(len(named) == shard["rows"], "rows")
        for number, row in enumerate(stored):
            self._check_row(row, is_held_out_one=number >= shard["rows"] - shard["held_out_rows"])
            counts = self._counts(row)
            columns = {
                name: column.decoded(table.column(name)[number].as_py(), counts)
                for table, described in tables.values()
                for name, column in described.items()
            }
            yield row, columns

    def _table(self, group: str, info: Json) -> tuple[pa.Table, dict[str, Column]]:
        table = pa.ipc.open_file(pa.BufferReader(self._bytes(info))).read_all()
        said = json.loads(table.schema.metadata[b"teachercache"])
        check(said["settings_fingerprint"] == self.manifest["settings_fingerprint"], "a file of another cache")
        for section in self.manifest["groups"][group]:
            check(said["targets"][section] == self.manifest["target_digests"][section], f"other {section}")
        return table, {name: Column(each) for name, each in said["columns"].items()}

    def _check_row(self, row: Json, *, is_held_out_one: bool) -> None:
        share = self.manifest["corpus"]["held_out"]
        check(row["row_id"] == row_id(row["segments"]), "row_id")
        check(row["held_out"] == is_held_out_one, "held-out rows come last")
        check({is_held_out(s["source_id"], share) for s in row["segments"]} == {row["held_out"]}, "held_out")
        check(row["positions"] == sum(row["target_mask"]), "positions")

    @staticmethod
    def _counts(row: Json) -> dict[str, int]:
        starts = [*(segment["start"] for segment in row["segments"]), len(row["input_ids"])]
        lengths = np.diff(starts)
        pairs = int((lengths * (lengths + 1) // 2).sum())
        return {"position": row["positions"], "token": len(row["input_ids"]), "pair": pairs}

    def head_log_probs(self, columns: dict[str, Array]) -> dict[float, Array]:
        """Reads kind `top-k`: log-probabilities of the head's tokens, [positions, k], by temperature."""
        logits, tails = (columns[name].astype(np.float64) for name in ("head_logits", "tail_log_partition"))
        found = {}
        for tail, temperature in zip(tails.T, self.manifest["targets"]["logits"]["temperatures"], strict=True):
            log_z = np.log(np.exp(logits / temperature).sum(1) + np.exp(tail))
            found[float(temperature)] = logits / temperature - log_z[:, None]
        return found
