"""What a precompute job is, before any compute is spent.

Planning reads the corpus once, hashes it, and stages it as work units of raw documents under `.work/units/`, so that every
unit is the same whenever it runs again, also from a streamed dataset. The job's identity is its fingerprint: equal
fingerprints mean equal inputs and settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from teachercache.config import Recipe
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CacheError, CorpusError, RecipeError
from teachercache.models import find_model, load_config, load_tokenizer, weights_identity
from teachercache.shards.manifest import MANIFEST, WORK_FOLDER, fingerprint_of, read_manifest
from teachercache.targets import TopK, target_kind
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint, vocabulary_size

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """A planned job. `identity` is what the fingerprint covers; `units` counts the staged files."""

    folder: Path
    fingerprint: str
    identity: dict[str, Any]
    kind: TopK
    units: int
    rows_in: int
    deduplicated: int
    stage_seconds: float = field(default=0.0, compare=False)

    @property
    def work(self) -> Path:
        """Folder of everything that is gone once the manifest is committed."""
        return self.folder / WORK_FOLDER

    def unit_file(self, unit: int) -> Path:
        """The staged documents of a unit."""
        return self.work / "units" / f"{unit:05d}.jsonl.zst"

    def record_file(self, unit: int) -> Path:
        """Exists once the unit's shard is in place."""
        return self.work / "done" / f"{unit:05d}.json"

    def pending(self) -> list[int]:
        """Units without a record."""
        return [unit for unit in range(self.units) if not self.record_file(unit).is_file()]


def make_plan(recipe: Recipe) -> Plan:
    """Check the recipe against its teacher, stage the corpus, and find what is already done.

    Raises a `UserError` for everything that can be known before compute is spent: a model or corpus that cannot be read,
    k above the vocabulary, sequences longer than the model's context, a folder that holds another job.
    """
    recipe.require("teacher", "corpus")
    teacher, corpus = recipe.teacher, recipe.corpus
    assert teacher is not None and corpus is not None
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    config = load_config(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    tokens = _describe_tokenizer(tokenizer)
    if corpus.messages_field is not None:
        tokens["chat_template"] = template_fingerprint(tokenizer)
    kind = target_kind(recipe.targets.logits.model_dump(), vocabulary_size=tokens["vocabulary_size"])
    _check_context(recipe, config)
    identity = {
        "teacher": {
            "model": find_model(teacher.model).portable_id,
            "dtype": teacher.dtype,
            "attention": teacher.attention,
            **weights_identity(teacher.model, revision=teacher.revision, commit=getattr(config, "_commit_hash", None)),
        },
        "tokenizer": tokens,
        "sequence": recipe.sequence.model_dump(),
        "targets": {"logits": kind.settings()},
        "units": recipe.precompute.model_dump(include={"unit_rows", "unit_bytes", "positions_per_batch"}),
    }
    return _stage(recipe, identity, kind, tokenizer, config)


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocabulary_size": vocabulary_size(tokenizer),
        "pad_id": pad if pad is not None else 0,
        "eos_id": tokenizer.eos_token_id,
    }


def _check_context(recipe: Recipe, config: Any) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.sequence.length > context:
        raise RecipeError(
            f"sequence.length is {recipe.sequence.length}, but the teacher's context holds {context} tokens; lower it"
        )


def _stage(recipe: Recipe, identity: dict[str, Any], kind: TopK, tokenizer: Any, config: Any) -> Plan:
    folder, corpus = recipe.cache, recipe.corpus
    assert corpus is not None
    known = _known_job(folder)
    work = folder / WORK_FOLDER
    staging = None if known else work / "units.tmp"
    # Where a corpus comes from is no part of its identity: what it holds is.
    described = corpus.model_dump(exclude={"limit", "format", "streaming"})
    described["source"] = _portable_source(corpus.source)
    counts = _Counts()
    with _removed_on_failure(staging, folder):
        units = _write_units(_counted(documents(read_rows(corpus), corpus), counts), recipe, staging)
        if counts.rows_in == 0:
            raise CorpusError(f"the corpus {corpus.source} is empty: check corpus.source, split and text_field")
    identity = {**identity, "corpus": {**described, "digest": counts.digest.hexdigest()}}
    plan = Plan(folder, fingerprint_of(identity), identity, kind, units, counts.rows_in, counts.deduplicated)
    if known:
        _check_same_job(known, identity, folder)
    else:
        _begin(plan, staging, tokenizer, config)
    return plan


@contextmanager
def _removed_on_failure(staging: Path | None, folder: Path) -> Iterator[None]:
    """An empty staging folder that goes, with all that was made for it, when the corpus cannot be read."""
    if staging is None:
        yield
        return
    shutil.rmtree(staging, ignore_errors=True)
    new = not folder.exists()
    staging.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder if new else staging.parent, ignore_errors=True)
        raise


@dataclass
class _Counts:
    rows_in: int = 0
    deduplicated: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


def _counted(items: Iterable[Any], counts: _Counts) -> Iterator[Document]:
    for item in items:
        counts.rows_in += 1
        if not isinstance(item, Document):
            counts.deduplicated += 1
            continue
        counts.digest.update(f"{item.source_id} {item.occurrence} {item.problem}\n".encode())
        yield item


def _write_units(items: Iterable[Document], recipe: Recipe, staging: Path | None) -> int:
    """Cut the documents into units and, with a folder, write them there; returns how many there are."""
    units = rows = size = 0
    sink = None
    for document in items:
        line = (document.to_json() + "\n").encode()
        if units == 0 or rows >= recipe.precompute.unit_rows or size >= recipe.precompute.unit_bytes:
            if sink is not None:
                sink.close()
            sink = _open_unit(staging, units) if staging is not None else None
            units, rows, size = units + 1, 0, 0
        if sink is not None:
            sink.write(line)
        rows, size = rows + 1, size + len(line)
    if sink is not None:
        sink.close()
    return units


def _open_unit(staging: Path, unit: int) -> Any:
    return pa.CompressedOutputStream(pa.OSFile(str(staging / f"{unit:05d}.jsonl.zst"), "wb"), "zstd")


def read_unit(path: Path) -> list[Document]:
    """The staged documents of a unit."""
    with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
        return [Document.from_json(line) for line in stream.read().splitlines()]


def _known_job(folder: Path) -> dict[str, Any] | None:
    """Identity of the job that the folder holds, finished or not; refuses folders that hold something else."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return manifest.job
    plan = folder / WORK_FOLDER / PLAN
    if plan.is_file():
        return json.loads(plan.read_text(encoding="utf-8"))
    if folder.exists() and (not folder.is_dir() or any(path.name != WORK_FOLDER for path in folder.iterdir())):
        raise CacheError(f"{folder} exists and holds no cache of ours; choose another `cache:` or empty it")
    return None


def _check_same_job(known: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    different = sorted(_differences(known, identity))
    if different:
        raise CacheError(
            f"the cache at {folder} was made with other settings or data (different: {', '.join(different)}); "
            "choose another `cache:`, or delete that folder to start over"
        )


def _differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            yield from _differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(left) != json.dumps(right):
        yield path


def _portable_source(source: str) -> str:
    return Path(source).name if Path(source).expanduser().exists() else source


def _begin(plan: Plan, staging: Path | None, tokenizer: Any, config: Any) -> None:
    assert staging is not None
    save_teacher_files(
        plan.folder / "teacher", tokenizer, config, fingerprint=plan.identity["tokenizer"]["fingerprint"]
    )
    staging.rename(plan.work / "units")
    (plan.work / "done").mkdir(exist_ok=True)
    temporary = plan.work / (PLAN + ".tmp")
    temporary.write_text(json.dumps(plan.identity, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(plan.work / PLAN)


def save_teacher_files(folder: Path, tokenizer: Any, config: Any, *, fingerprint: str) -> None:
    """Tokenizer and config.json of the teacher, without paths of this machine; checks that the tokenizer survives saving."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "quantization_config", "auto_map"):
            data.pop(key, None)
        (folder / name).write_text(
            json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if tokenizer_fingerprint(load_tokenizer(str(folder))) != fingerprint:
        raise CacheError("the teacher's tokenizer changes when it is saved and loaded; a cache cannot describe it")
