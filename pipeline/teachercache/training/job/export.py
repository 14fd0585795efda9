"""A checkpoint to the student that leaves the run: a plain Hugging Face folder, weights and tokenizer, whose files agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from teachercache.config import StudentConfig
from teachercache.models.loading import without_paths
from teachercache.training.initialise.lora import copy_adapters, write_merged
from teachercache.training.job.stopping import Ends
from teachercache.training.trainer.layers import without_adapters

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab*",
    "merges.txt",
    "*.model",
)
CODE = (".py", ".pyc", ".so")  # a student runs without code of its own, whoever made the tokenizer's files


def export_student(checkpoint: Path, *, config: StudentConfig, tokenizer: Path, ends: Ends, student: Path) -> None:
    """Make the folder `student` from a checkpoint's weights and the tokenizer's files; `ends` are what its rows ended with.

    It appears under its name only when it is whole; an earlier one is replaced. Where adapters were trained, they are
    merged, and lie by themselves in the folder `adapters` beside it.
    """
    temporary = student.with_name(f".{student.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if config.lora is None:
        _copy(_matching(checkpoint, MODEL_FILES), temporary)
        without_adapters(temporary)
    else:
        write_merged(checkpoint, config, temporary)
        copy_adapters(checkpoint, student.with_name("adapters"))
    _copy({path for path in _matching(tokenizer, TOKENIZER_FILES) if path.suffix not in CODE}, temporary)
    _without_code(temporary / "tokenizer_config.json")
    ends.write(temporary)
    shutil.rmtree(student, ignore_errors=True)
    temporary.replace(student)


def _without_code(file: Path) -> None:
    """Leave out of a tokenizer's configuration what names code; a file that names none stays as it is, byte for byte."""
    if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
        without_paths(file)


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern)}


def _copy(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
