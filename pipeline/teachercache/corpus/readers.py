"""Raw rows of any corpus that a recipe can name.

Which reader serves a source (`corpus.format: auto`):

    python-docs                                    CPython's own documentation topics, repetitions left out
    a file, a glob, a folder of files              by suffix: Parquet, JSON lines (.gz, .zst, .bz2), text
    a folder that `datasets` wrote or describes    `datasets` (save_to_disk, a dataset card, files named by split)
    a URL, or a name that is nothing on this disk  `datasets`

The files of a folder or glob share one suffix; a README of another one describes them and is no part of the corpus.
Where several kinds of documents lie together, `corpus.format` says which format to read, then with all its suffixes.
Files are read in sorted order and in bounded memory, streaming or not; slices mean there what they mean to `datasets`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from teachercache.config import CorpusConfig
from teachercache.corpus import files
from teachercache.corpus.files import Row, check_field, format_of, suffix_of
from teachercache.corpus.hub import dataset_rows, is_saved_dataset, slice_bounds
from teachercache.corpus.python_docs import python_topics
from teachercache.errors import CorpusError

PEEK_ROWS = 100
_SPLIT_NAME = re.compile(r"(?:^|[-_./ ])(train|test|valid|validation|val|dev|eval)(?=[-_./ ]|$)")
_READERS = {
    "parquet": (files.parquet_count, files.parquet_rows),
    "jsonl": (files.jsonl_count, files.jsonl_rows),
    "text": (files.text_count, files.text_rows),
}


def read_rows(config: CorpusConfig) -> Iterator[Row]:
    """Raw rows, each a dict that holds the text or messages field, or `_unreadable` with a reason and `_raw`.

    Opens the corpus and looks at up to 100 rows before it returns. Raises `CorpusError` for a corpus that is missing,
    empty, wholly unreadable, or without the wanted field (the message lists the fields there are).
    """
    rows = islice(_open(config), config.limit)
    head = list(islice(rows, PEEK_ROWS))
    _check_head(head, config)
    return chain(head, rows)


def _check_head(head: Sequence[Row], config: CorpusConfig) -> None:
    if not head:
        raise CorpusError(
            f"corpus {config.source} holds no rows (corpus.split: {config.split}); check corpus.source and corpus.split"
        )
    readable = [row for row in head if "_unreadable" not in row]
    if not readable:
        reason = head[0]["_unreadable"]
        raise CorpusError(
            f"corpus {config.source}: none of the first {len(head)} rows can be read: {reason}; say what the files "
            "are with corpus.format, or mend them"
        )
    field = config.messages_field or config.text_field
    if not any(field in row for row in readable):
        check_field(field, sorted({key for row in readable for key in row}), origin=f"corpus {config.source}")


def _open(config: CorpusConfig) -> Iterator[Row]:
    kind = kind_of(config)
    if kind == "datasets":
        return dataset_rows(config)
    if kind == "python-docs":
        return _python_docs(config)
    count, rows = _READERS[kind]
    paths = paths_of(config.source, kind=kind)
    field = config.messages_field or config.text_field
    if config.split == "train":
        return rows(paths, field=field)
    parts = slice_bounds(config.split, {"train": count(paths)}, origin=f"corpus {config.source}")
    return chain.from_iterable(rows(paths, field=field, start=start, stop=stop) for _, start, stop in parts)


def count_rows(path: Path, *, kind: str) -> int:
    """Number of rows of a file of this format."""
    count, _ = _READERS[kind]
    return count([path])


def kind_of(config: CorpusConfig) -> str:
    """The reader that serves the source: `datasets`, `python-docs`, or a format of files. Raises `CorpusError`."""
    if config.format != "auto":
        return config.format
    if config.source == "python-docs":
        return "python-docs"
    path = Path(config.source).expanduser()
    if path.is_dir():
        described = _is_described(path) or config.name
        return "datasets" if described else _kind_of_files(paths_of(config.source, kind=None), config.source)
    if path.is_file() or glob.has_magic(config.source):
        return _kind_of_files(paths_of(config.source, kind=None), config.source)
    if _names_a_path(config.source):
        raise CorpusError(f"corpus {config.source} does not exist; check corpus.source")
    return "datasets"


def _is_described(folder: Path) -> bool:
    """Tells whether `datasets` knows more about this folder than the suffixes of its files say."""
    card = folder / "README.md"
    if is_saved_dataset(folder) or (card.is_file() and card.read_bytes()[:3] == b"---"):
        return True
    data = [path.relative_to(folder) for path in _visible(folder) if format_of(path) in ("parquet", "jsonl")]
    return len({match for path in data for match in _SPLIT_NAME.findall(path.as_posix().lower())}) > 1


def _kind_of_files(paths: Sequence[Path], source: str) -> str:
    kinds = {suffix_of(path): kind for path in paths if (kind := format_of(path))}
    if len(kinds) == 1:
        return kinds.popitem()[1]
    if kinds:
        raise CorpusError(
            f"corpus {source} mixes {' and '.join(sorted(kinds))} files; say which to read with corpus.format "
            f"({' or '.join(sorted(set(kinds.values())))}), or with a glob such as *{min(kinds)}"
        )
    raise CorpusError(
        f"corpus {source}: no file with a known suffix (.parquet, .jsonl, .txt, .md); say what it is with corpus.format"
    )


def paths_of(source: str, *, kind: str | None) -> list[Path]:
    """Files of a source in sorted order; among several, those of the format, if there are any."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _visible(path)
    elif glob.has_magic(source):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
        files = sorted(Path(name) for name in names if Path(name).is_file())
    else:
        files = []
    if not files:
        if path.is_dir():
            raise CorpusError(f"corpus {source} is an empty folder; put files there, or set another corpus.source")
        raise CorpusError(f"corpus {source} does not exist; check corpus.source")
    matching = [file for file in files if kind is None or format_of(file) == kind]
    return _documents(matching or files)


def _documents(paths: Sequence[Path]) -> list[Path]:
    """`paths` without a README of another suffix than all others."""
    suffixes = {suffix_of(path) for path in paths if path.stem.upper() != "README"}
    return [path for path in paths if not suffixes or suffix_of(path) in suffixes]


def _visible(folder: Path) -> list[Path]:
    """Every file under a folder, sorted, without hidden ones and markers such as _SUCCESS."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in inside if not any(part[0] in "._" for part in p.relative_to(folder).parts))


def _names_a_path(source: str) -> bool:
    if "://" in source:
        return False
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or format_of(source) is not None


def _python_docs(config: CorpusConfig) -> Iterator[Row]:
    rows = [{config.text_field: text} for text in python_topics()]
    if config.split == "train":
        return iter(rows)
    parts = slice_bounds(config.split, {"train": len(rows)}, origin="corpus python-docs")
    return chain.from_iterable(rows[start:stop] for _, start, stop in parts)
