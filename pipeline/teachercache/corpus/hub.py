"""Rows through the `datasets` library: the Hub, folders it understands, saved datasets, URLs, streaming."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.config import CorpusConfig
from teachercache.corpus.files import BATCH_ROWS, Row, check_field, format_of
from teachercache.errors import CorpusError

BUILDERS = {"parquet": "parquet", "jsonl": "json", "text": "text"}


def dataset_rows(config: CorpusConfig) -> Iterator[Row]:
    """Rows of a dataset; only the wanted column is decoded.

    Raises `CorpusError`, one line with the remedy, for whatever `datasets` cannot find, reach or read. Opening happens
    at the call, reading as the rows are drawn.
    """
    dataset = open_dataset(config)
    field = config.messages_field or config.text_field
    if dataset.column_names is not None:  # streams of unknown schema are checked by their first rows
        check_field(field, dataset.column_names, origin=f"dataset {config.source}")
        dataset = dataset.select_columns([field])
    return _iterate(dataset.with_format(None), config)


def is_saved_dataset(folder: Path) -> bool:
    """Tells whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def slice_bounds(split: str, sizes: dict[str, int], *, origin: str) -> list[tuple[str, int, int]]:
    """(split, start, stop) of a split expression such as `train[:10%]+train[-5:]`, with the semantics of `datasets`.

    `sizes` holds the rows of every split there is.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise CorpusError(
            f"{origin}: corpus.split {split!r} is not valid: {_one_line(error)}; splits here: "
            f"{', '.join(sorted(sizes))}, slices read train[:10%] or train[100:200]"
        ) from None
    return [(part.splitname, part.from_, part.to) for part in parts]


def open_dataset(config: CorpusConfig) -> Any:
    """The dataset that `datasets` opens for a source: one that is indexed, or a stream. Raises `CorpusError`."""
    source = Path(config.source).expanduser()
    if is_saved_dataset(source):
        return _open_saved(source, config)
    if config.streaming and "[" in config.split:
        raise CorpusError(
            f"dataset {config.source}: a stream has no slices (corpus.split: {config.split}); "
            "use corpus.limit, or corpus.streaming: false"
        )
    try:
        return _load(source, config)
    except CorpusError:
        raise
    except Exception as error:  # `datasets` raises a dozen unrelated types for what is missing or out of reach
        raise CorpusError(f"dataset {config.source} cannot be loaded: {_one_line(error)}; {_remedy(error)}") from error


def _load(source: Path, config: CorpusConfig) -> Any:
    from datasets import load_dataset

    if source.is_dir():
        return load_dataset(str(source.resolve()), config.name, split=config.split, streaming=config.streaming)
    if not (source.is_file() or "://" in config.source or glob.has_magic(config.source)):
        return load_dataset(
            config.source, config.name, split=config.split, streaming=config.streaming, revision=config.revision
        )
    kind = format_of(config.source)
    if kind is None:
        raise CorpusError(
            f"dataset {config.source}: the suffix names no known format (.parquet, .jsonl, .txt); name a file with one of these"
        )
    options = {"sample_by": "document"} if kind == "text" else {}
    files = config.source if "://" in config.source else str(source)
    return load_dataset(BUILDERS[kind], data_files=files, split=config.split, streaming=config.streaming, **options)


def _open_saved(folder: Path, config: CorpusConfig) -> Any:
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # as above
        raise CorpusError(f"saved dataset {folder} cannot be loaded: {_one_line(error)}; save it again") from error
    # a single dataset answers to its own split's name and to the default one
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded, str(loaded.split or "train"): loaded}
    sizes = {name: len(dataset) for name, dataset in splits.items()}
    parts = slice_bounds(config.split, sizes, origin=f"saved dataset {folder}")
    return concatenate_datasets([splits[name].select(range(start, max(start, stop))) for name, start, stop in parts])


def _iterate(dataset: Any, config: CorpusConfig) -> Iterator[Row]:
    try:
        for batch in dataset.iter(batch_size=BATCH_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    except Exception as error:  # a broken connection or file, far into the stream
        raise CorpusError(f"dataset {config.source}: reading stopped: {_one_line(error)}; {_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    text = f"{error} {error.__cause__}".lower()
    if "gated" in text or "authenticated" in text:
        return "accept its terms on the Hub and run `hf auth login`"
    if "json" in text:
        return "corpus.format: jsonl quarantines lines that are not JSON instead"
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return "check the network (and HF_HUB_OFFLINE), or name a local file or folder"
    return "check corpus.source, corpus.name and corpus.split, or name a local file or folder"


def _one_line(error: BaseException) -> str:
    detail = f"{error}: {error.__cause__}" if error.__cause__ and str(error.__cause__) not in str(error) else f"{error}"
    return " ".join(detail.split()).rstrip(".")[:400] or type(error).__name__
