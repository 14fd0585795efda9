"""A table of forged caches: by name, an edit of a cache's folder that leaves its digests right.

Made from lists of damages over the keys of the manifest, of index files, of an alignment, over columns, tokenizer files,
templates, and what may lie in a file's place.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cache.forged_batches import many_rows, one_batch_often
from cache.forgery import INDEX, Data, manifest_of, payload, rewrite, sign, write_signed
from teachercache.cache.files.digests import fingerprint_of, hash_file
from teachercache.cache.manifest.manifest import MANIFEST

from hostile_tokenizers import CONFIGS, DESCRIPTIONS

Forge = Callable[[Path], Any]

# ------------------------------------------------------------------ values that a key may have

DEEP: Any = None
for _ in range(300):
    DEEP = [DEEP]
VALUES: dict[str, Any] = {
    "null": None, "a list": [], "a number": -1, "text": "x" * 10_000, "depth": DEEP, "a million": [[]] * 10**6,
    "NaN": float("nan"),
}  # fmt: skip
KEYS = (
    "settings", "targets", "groups", "teacher", "model", "corpus", "units", "calibration", "fidelity",
    "column_bytes", "audit", "files",
)  # fmt: skip


def manifests() -> Iterator[tuple[str, Forge]]:
    """Keys of the manifest gone, or with values of another kind."""
    for number, key in enumerate(KEYS):
        yield f"manifest without {key}", lambda folder, key=key: sign(folder, lambda data: data.pop(key))
        for name in ("null", "depth", list(VALUES)[number % len(VALUES)]):
            value = VALUES[name]
            yield (
                f"manifest: {key} is {name}",
                lambda folder, key=key, value=value: sign(folder, lambda data: data.update({key: value})),
            )
    for key, value in {
        "target_digests": None, "format_version": 99, "requires": ["a later feature"], "totals": {"rows": 2**62},
    }.items():  # fmt: skip
        yield f"manifest: {key} is {value}", lambda folder, key=key, value=value: _head(folder, {key: value})
    for section, key, value in (
        ("tokenizer", "vocabulary_size", 2**31), ("tokenizer", "vocabulary_size", 2**24), ("tokenizer", "pad_id", -1),
        ("tokenizer", "prefix_ids", [1] * 10**5), ("tokenizer", "fingerprint", "0" * 64), ("sequence", "length", 2**40),
        ("sequence", "length", 1), ("sequence", "layout", "\x1b[31m"),
    ):  # fmt: skip
        yield (
            f"settings: {section}.{key} is {str(value)[:20]!r}",
            lambda folder, s=section, k=key, v=value: sign(folder, lambda data: data["settings"][s].update({k: v})),
        )


LINES = "\nok: all files are whole" * 10**5


def lines() -> Iterator[tuple[str, Forge]]:
    """Texts of megabytes with lines that look like those of `verify`, wherever a message may quote them."""
    for key, value in {"format_version": f"9{LINES}", "requires": [f"x{LINES}"], "groups": {LINES: [LINES]}}.items():
        yield f"lines for {key}", lambda folder, key=key, value=value: _head(folder, {key: value})
    yield (
        "lines for the size of an index",
        lambda folder: _head(folder, {"index": [{**_entry(folder), "bytes": LINES}]}),
    )
    yield "lines for the name of an index", lambda folder: _head(folder, {"index": [{**_entry(folder), "file": LINES}]})
    for name, edit in {
        "a column's name": lambda data: data["column_bytes"].update({LINES: -1}),
        "a count of the audit": lambda data: data["audit"].update(stored=LINES),
        "the texts of the audit": lambda data: data["audit"].update(
            rows_in="", stored=LINES, quarantined="", deduplicated=""
        ),
        "a kind": lambda data: data["targets"]["logits"].update(kind=LINES),
        "a prefix": lambda data: data["settings"]["sequence"].update(prefix=LINES),
    }.items():
        yield f"lines for {name}", lambda folder, edit=edit: sign(folder, edit)
    yield (
        "lines for a reason in an alignment",
        lambda folder: _alignment(folder, lambda data: data["unaligned"].update({LINES: -1})),
    )
    yield (
        "lines for the version of an alignment",
        lambda folder: _alignment(folder, lambda data: data.update(format_version=LINES)),
    )


def loose() -> Iterator[tuple[str, Forge]]:
    """Texts that Python's reader takes for JSON, and others do not."""
    twice = '{"requires": ["a later feature"], "fingerprint": "0", '
    yield "keys of the manifest twice", lambda folder: _text(folder / MANIFEST, twice)
    yield (
        "keys of an alignment twice",
        lambda folder: _text(_alignment_file(folder), '{"requires": ["a later feature"], '),
    )
    yield "NaN under a key that nobody knows", lambda folder: sign(folder, lambda data: data.update(zzz=float("nan")))
    for value in (2.0, True, None, [2]):
        yield f"format_version is {value}", lambda folder, value=value: _head(folder, {"format_version": value})
    yield "requires is a text", lambda folder: _head(folder, {"requires": ""})


def _text(path: Path, begins: str) -> None:
    path.write_text(path.read_text().replace("{", begins, 1))


def _entry(folder: Path) -> Data:
    [entry] = json.loads((folder / MANIFEST).read_text())["index"]
    return dict(entry)


def _head(folder: Path, change: Data) -> None:
    """Change the manifest as it is written, and its digest."""
    data = json.loads((folder / MANIFEST).read_text())
    data.update(change)
    del data["digest"]
    unsigned = {key: value for key, value in data.items() if key != "format"}
    (folder / MANIFEST).write_text(json.dumps({**data, "digest": fingerprint_of(unsigned)}))


def bombs() -> Iterator[tuple[str, Forge]]:
    """JSON that takes many times its size."""
    lists = "[" + "[]," * 10**7 + "[]]"
    for name, text in {
        "lists": lists, "depth": "[" * 10**6 + "]" * 10**6, "a number": "1" * 2**24, "a text": '"' + "é" * 2**24 + '"',
        "keys": "{" + ",".join(f'"{n}":{{}}' for n in range(2 * 10**6)) + "}",
    }.items():  # fmt: skip
        yield (
            f"a manifest of {name}",
            lambda folder, text=text: (folder / MANIFEST).write_text('{"format": "teachercache", "x": ' + text + "}"),
        )
        yield f"an index of {name}", lambda folder, text=text: _index(folder, text)
        yield (
            f"an alignment of {name}",
            lambda folder, text=text: _alignment_file(folder).write_text('{"x": ' + text + "}"),
        )
        yield f"a tokenizer of {name}", lambda folder, text=text: _signed(folder, "teacher/tokenizer.json", text)
        yield (
            f"a configuration of {name}",
            lambda folder, text=text: _signed(folder, "teacher/tokenizer_config.json", text),
        )
    yield (
        "a shard's metadata of lists",
        lambda folder: rewrite(folder, metadata=lambda data: data.update(x=[[]] * 10**6)),
    )


def _signed(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    sign(folder)


def _index(folder: Path, text: str) -> None:
    sign(folder)
    path = folder / INDEX
    path.write_text('{"format": "teachercache-index", "shards": ' + text + ', "files": {}}')
    data = json.loads((folder / MANIFEST).read_text())
    _head(folder, {"index": [{**data["index"][0], "bytes": path.stat().st_size, "sha256": hash_file(path)}]})


def indexes() -> Iterator[tuple[str, Forge]]:
    """Columns of the lists of shards."""
    for key in ("rows", "held_out_rows", "positions", "tokens", "row_ids"):
        for name, change in {
            "gone": lambda shard, key: shard.pop(key), "negative": lambda shard, key: shard.update({key: -1}),
            "huge": lambda shard, key: shard.update({key: 2**60}), "half": lambda shard, key: shard.update({key: 0.5}),
            "true": lambda shard, key: shard.update({key: True}),
            "a list": lambda shard, key: shard.update({key: [[]] * 10**5}),
        }.items():  # fmt: skip
            yield (
                f"index: {key} is {name}",
                lambda folder, key=key, change=change: sign(folder, lambda data: change(data["shards"][0], key)),
            )
    names = [
        "/etc/passwd",
        "../../outside",
        "a//b",
        "./a",
        "",
        ".",
        "a\0b",
        "a\\b",
        "x/" * 300 + "x",
        "shards",
        "\x1b[2J",
        "manifest.json",
    ]
    for name in names:
        yield f"index: a shard is {name[:20]!r}", lambda folder, name=name: _renamed(folder, name)
    for name in names:
        yield (
            f"files: one more is {name[:20]!r}",
            lambda folder, name=name: sign(
                folder, lambda data: data["files"].append({"file": name, "bytes": 0, "sha256": "0" * 64})
            ),
        )
    yield "index: a shard twice", lambda folder: sign(folder, lambda data: data["shards"].append(data["shards"][0]))
    yield "index: no shard", lambda folder: sign(folder, lambda data: data["shards"].clear())


def _renamed(folder: Path, name: str) -> None:
    data = manifest_of(folder)
    next(iter(data["shards"][0]["files"].values()))["file"] = name
    write_signed(folder, data)


# ------------------------------------------------------------------ rows and calibration


def _first(name: str, value: Any) -> Forge:
    return lambda folder: rewrite(folder, columns=lambda data: data[name].__setitem__(0, value))


def contents() -> Iterator[tuple[str, Forge]]:
    """Values of rows and of what they are read by."""
    yield "batches of millions of rows", many_rows
    yield "a batch of millions of rows, four hundred times", one_batch_often
    yield "a token beyond the vocabulary", _first("input_ids", [10**6] * 8)
    yield "no token", _first("input_ids", [])
    yield "a million tokens", _first("input_ids", [1] * 10**6)
    yield "no segment", _first("segments", [])
    yield "positions without end", _first("positions", 2**31 - 1)
    yield (
        "a text of megabytes for a row's id",
        lambda folder: rewrite(folder, columns=lambda data: data["row_id"].__setitem__(1, data["row_id"][0])),
    )
    for name, change in {
        "every": {"every": 2**62}, "shape": {"shape": [2**62]}, "dtype": {"dtype": "O"}, "codec": {"codec": "future/9"},
        "groups": {"groups": [2**40]}, "tables": {"tables": "A" * 2**20}, "ragged": {"ragged": True},
    }.items():  # fmt: skip
        yield (
            f"a column whose {name} cannot be",
            lambda folder, change=change: rewrite(
                folder, metadata=lambda data: data["columns"]["sketch_codes"].update(change)
            ),
        )
    yield "a column's page of nothing", _first("sketch_codes", b"")
    yield "a column's page of other bytes", _first("sketch_codes", b"\xff" * 2**16)
    yield "ranks beyond the vocabulary", lambda folder: payload(folder, "head_ranks", _all(2**31 - 1))
    for name, arrays in {
        "NaN": {"basis_Vr": np.full((300, 8), np.nan, np.float16)}, "no rank": {"basis_Vr": np.zeros((300, 0), np.float16)},
        "one more array": {"surprise": np.zeros(2**20, np.float32)}, "other vocabulary": {"base_V": np.zeros(9, np.float32)},
    }.items():  # fmt: skip
        yield f"a basis with {name}", lambda folder, arrays=arrays: _basis(folder, arrays)
    yield "a basis that says lists", lambda folder: _basis(folder, {}, {"x": json.dumps([[]] * 10**6)})


def _all(value: Any) -> Callable[[Any], Any]:
    return lambda array: np.full_like(array, value if array.dtype.kind == "f" else np.iinfo(array.dtype).max)


def _basis(folder: Path, arrays: dict[str, Any], said: dict[str, str] | None = None) -> None:
    [path] = (folder / "teacher").glob("sketch-*.safetensors")
    save_file({**load_file(path), **arrays}, path, said or {"teachercache-basis": '{"version": 1}'})
    sign(folder)


# ------------------------------------------------------------------ tokenizers and templates


def tokenizers() -> Iterator[tuple[str, Forge]]:
    """Claims that tests/tokens tries, in a cache and in an alignment."""
    for name, edit in DESCRIPTIONS.items():
        yield f"tokenizer: {name}", lambda folder, edit=edit: _tokenizer(folder, edit)
    for name in (
        "a file of its own", "a vocabulary of its own", "an added id of 2^31", "code of its own", "many special tokens",
        "many further tokens", "many tokens with names",
    ):  # fmt: skip
        yield f"tokenizer_config: {name}", lambda folder, name=name: _configuration(folder, CONFIGS[name])
    yield "special_tokens_map: many tokens", _special_tokens


def _special_tokens(folder: Path) -> None:
    """A list of special tokens in the file that is for it alone."""
    name = "teacher/special_tokens_map.json"
    (folder / name).write_text(json.dumps({"additional_special_tokens": [f"t{n}" for n in range(200_000)]}))
    sign(folder, lambda data: data["files"].append({"file": name, "bytes": 0, "sha256": ""}))


def _tokenizer(folder: Path, edit: Any) -> None:
    path = folder / "teacher" / "tokenizer.json"
    data = json.loads(path.read_text())
    if edit is None:
        data = [data]
    else:
        edit(data)
    _signed(folder, "teacher/tokenizer.json", json.dumps(data))


def _configuration(folder: Path, change: Data) -> None:
    path = folder / "teacher" / "tokenizer_config.json"
    _signed(folder, "teacher/tokenizer_config.json", json.dumps({**json.loads(path.read_text()), **change}))


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
TEMPLATES = {
    "loops": LOOPS + "{% endfor %}{% endfor %}{% endfor %}", "text": "{{ 'ha' * 10 ** 10 }}", "a number": "{{ 9 ** (9 ** 9) }}",
    "itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "width": "{{ 'a' | center(10 ** 11) }}",
    "no syntax": "{% for", "brackets": "{{ " + "(" * 10**5 + ")" * 10**5 + " }}",
    "doubling": "{% set n = namespace(t='ha') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
}  # fmt: skip


def templates() -> Iterator[tuple[str, Forge]]:
    """Chat templates of a cache's tokenizer."""
    for name, text in TEMPLATES.items():
        yield f"a template of {name}", lambda folder, text=text: _template(folder, text)
    no_text = [{"name": "default", "template": 7}]
    yield "a number for a template", lambda folder: _configuration(folder, {"chat_template": no_text})


def _template(folder: Path, text: str) -> None:
    path = folder / "teacher" / "chat_template.jinja"
    path.write_text(text)
    sign(folder, lambda data: data["files"].append({"file": "teacher/chat_template.jinja", "bytes": 0, "sha256": ""}))


# ------------------------------------------------------------------ alignments


def alignments() -> Iterator[tuple[str, Forge]]:
    """Keys of alignment.json."""
    for key in (
        "cache",
        "tokenizer",
        "sequence_length",
        "vocabulary",
        "totals",
        "unaligned",
        "parts",
        "index",
        "files",
    ):
        yield f"alignment without {key}", lambda folder, key=key: _alignment(folder, lambda data: data.pop(key))
        for name in ("null", "depth", "a million"):
            yield (
                f"alignment: {key} is {name}",
                lambda folder, key=key, value=VALUES[name]: _alignment(folder, lambda data: data.update({key: value})),
            )
    for key, value in (("vocabulary_size", 2**31), ("pad_id", 2**20), ("fingerprint", "../../../outside"), ("name", 7)):
        yield (
            f"alignment: tokenizer.{key} is {value}",
            lambda folder, k=key, v=value: _alignment(folder, lambda data: data["tokenizer"].update({k: v})),
        )
    yield (
        "alignment: a file outside",
        lambda folder: _alignment(folder, lambda data: data["files"][0].update(file="teacher/tokenizer.json")),
    )


def _alignment_file(folder: Path) -> Path:
    [path] = (folder / "alignments").glob("*/alignment.json")
    return path


def _alignment(folder: Path, edit: Callable[[Data], Any]) -> None:
    path = _alignment_file(folder)
    data = json.loads(path.read_text())
    edit(data)
    data.pop("digest", None)
    unsigned = {key: value for key, value in data.items() if key != "format"}
    path.write_text(json.dumps({**data, "digest": fingerprint_of(unsigned)}))


# ------------------------------------------------------------------ what lies in a file's place


def _socket(path: Path, _: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path, whole: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**42)


IN_PLACE: dict[str, Callable[[Path, Path], Any]] = {
    "a link": lambda path, whole: path.symlink_to(whole), "a link to zeros": lambda path, _: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, _: path.symlink_to(path.name), "a pipe": lambda path, _: os.mkfifo(path),
    "a socket": _socket, "a folder": lambda path, _: path.mkdir(), "4 TiB of nothing": _sparse,
    "nothing": lambda path, _: None,
}  # fmt: skip
PLACES = (
    MANIFEST, "index/*", "shards/part-00000*", "teacher/tokenizer.json", "teacher/tokenizer_config.json", "teacher/sketch-*",
    "teacher/boundary-*", "alignments/*/alignment.json", "alignments/*/part-00000*", "alignments/*/vocabulary*",
    "alignments/*/index/*", "alignments/*/tokenizer/tokenizer.json",
)  # fmt: skip


def in_place() -> Iterator[tuple[str, Forge]]:
    """Links, pipes, sockets, folders, sparse files and nothing, for each kind of file."""
    for place in PLACES:
        for name in IN_PLACE:
            if place.endswith("alignment.json") and name in ("a folder", "nothing"):
                continue  # then there is no alignment
            yield f"{name} for {place}", lambda folder, place=place, name=name: _put(folder, place, name)
    for place in ("teacher/sketch-*", "teacher/tokenizer.json", "shards/part-00000*"):
        yield f"{place} of a terabyte, as the manifest says", lambda folder, place=place: _claimed(folder, place)
    if os.geteuid() == 0:
        yield "a device for a shard", lambda folder: _device(folder, "shards/part-00000*")


def _put(folder: Path, place: str, name: str) -> None:
    [path] = folder.glob(place)
    whole = folder.parent / "whole"
    shutil.copy(path, whole)
    path.unlink()
    IN_PLACE[name](path, whole)


def _claimed(folder: Path, place: str) -> None:
    """A sparse file whose size is the manifest's; its digest nobody has ever made."""
    [path] = folder.glob(place)
    path.unlink()
    name = path.relative_to(folder).as_posix()

    def claim(data: Data) -> None:
        entries = [*data["files"], *(info for shard in data["shards"] for info in shard["files"].values())]
        [entry] = [entry for entry in entries if entry["file"] == name]
        entry.update(bytes=2**40)

    sign(folder, claim)
    with path.open("wb") as stream:
        stream.truncate(2**40)


def _device(folder: Path, place: str) -> None:
    [path] = folder.glob(place)
    path.unlink()
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


# Listed files that nobody reads: `verify` alone has something to say.
UNREAD = {f"files: one more is {name!r}" for name in ("shards", MANIFEST)}
FORGERIES: dict[str, Forge] = {
    name: forge
    for family in (manifests, lines, loose, bombs, indexes, contents, tokenizers, templates, alignments, in_place)
    for name, forge in family()
}
