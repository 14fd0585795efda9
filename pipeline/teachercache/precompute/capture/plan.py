"""Plan of a precompute job, before any compute is spent.

Equal identities of jobs mean equal inputs and settings. Planning checks the recipe against
its teacher, reads the corpus once (staging.py), and decides between a new job, one to resume, and a finished one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.cache.files.column_groups import Group, ReadBy, groups_of, layout_of, target_digests
from teachercache.cache.files.digests import fingerprint_of, hash_file
from teachercache.cache.manifest import manifest_v1
from teachercache.cache.manifest.manifest import MANIFEST, WORK_FOLDER, read_manifest
from teachercache.cache.manifest.model import TEACHER_IDENTITY, Manifest
from teachercache.config import PrecomputeConfig, Recipe
from teachercache.corpus.chat import ChatRenderer
from teachercache.corpus.windows import check_room
from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.files import write_whole
from teachercache.models.loading import (
    find_model,
    load_config,
    load_tokenizer,
    save_tokenizer,
    weights_identity,
    without_paths,
)
from teachercache.precompute.capture.layers import layer_kinds
from teachercache.precompute.capture.shapes import CALIBRATION, INPUT_FORM, PLANNED, RECORD
from teachercache.precompute.capture.staging import Staged, empty_folder, stage, unit_name
from teachercache.precompute.engine.records import (
    check_named_by_content,
    check_unchanged,
    described,
    pending_units,
    read_json,
    read_shaped,
)
from teachercache.targets import BoundaryMass, LayerFile, StoredTargets, TargetKind, target_kind
from teachercache.targets.coding.columns import MOST_ROW_BYTES
from teachercache.targets.stored import LOGITS
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint, vocabulary_size
from teachercache.tokens.prefix import own_prefix, row_prefix
from teachercache.tokens.pretokens import begins_pretoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAN = "plan.json"
PLAN_VERSION = 2  # of the format that an unfinished job writes; the plans of format 1 say none
LOGIT_BYTES = 64  # about what a token's logits take, which the defaults of `unit_rows` and `unit_bytes` are chosen for
ALWAYS = {"layout", "length", "add_eos"}  # settings of `sequence` that every manifest has
# What an unfinished job may leave in the cache's folder.
OURS = {WORK_FOLDER, "teacher", "shards", "targets", "quarantine", "index"}


@dataclass(frozen=True)
class Plan:
    """A planned job. `identity` is all that decides what the cache will hold; `units` counts the staged files."""

    folder: Path
    identity: dict[str, Any]
    targets: StoredTargets
    units: int
    rows_in: int
    deduplicated: int
    files: list[dict[str, Any]] = field(
        default_factory=list
    )  # in teacher/, as planning wrote them: file, bytes, sha256

    @property
    def work(self) -> Path:
        """Folder of everything that is gone once the manifest is committed."""
        return self.folder / WORK_FOLDER

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that every row and every packed segment begins with."""
        return tuple(self.identity["tokenizer"].get("prefix_ids", ()))

    def unit_file(self, unit: int) -> Path:
        """The staged documents of a unit."""
        return self.work / "units" / unit_name(unit)

    def record_file(self, unit: int) -> Path:
        """Written once the unit's shard is in place."""
        return self.work / "done" / f"{unit:05d}.json"

    def record(self, unit: int) -> dict[str, Any] | None:
        """The unit's record, if there is one and the files that it names are there in full."""
        file = self.record_file(unit)
        remedy = f"delete it (rm {file}) and run the same command again: this unit is computed again"
        record = read_shaped(file, RECORD, remedy=remedy)
        if record is None:
            return None
        if record["shard"] and set(record["shard"]["files"]) != set(layout_of(self.targets)):
            raise CacheDamaged(f"{file} is of other column groups than this job has; {remedy}")
        if record["read_by"] != self.read_by():
            return None  # prepared anew: other files would read its codes as other numbers
        shard, quarantine = record["shard"], record["quarantine"]
        files = [*(shard["files"].values() if shard else ()), *([quarantine] if quarantine else ())]
        return record if all(_is_there(self.folder, file["file"], file["bytes"]) for file in files) else None

    @property
    def calibration_file(self) -> Path:
        """Written once basis and layer files are in place."""
        return self.work / "calibration.json"

    def calibration(self) -> dict[str, Any] | None:
        """Returns the rows that basis and layer files were made from, and these files; {} for targets without, None
        when it is due."""
        if not self.targets.needs_preparation:
            return {}
        record = read_shaped(
            self.calibration_file, CALIBRATION, remedy="delete it and run the same command again: it calibrates anew"
        )
        if record is None:
            return None
        return record if all((self.folder / name).is_file() for name in _made(record)) else None

    @property
    def input_file(self) -> Path:
        """Written once it is measured how the teacher takes the rows' beginnings."""
        return self.work / "input.json"

    def input_form(self) -> dict[str, Any]:
        """Returns the measured losses of input forms (input_form.py); {} before they are measured."""
        return read_shaped(self.input_file, INPUT_FORM, remedy="delete it and run the same command again") or {}

    def read_by(self) -> dict[str, dict[str, str]]:
        """Files that targets are read by, as far as they are made, by section and role."""
        read_by: dict[str, dict[str, str]] = (self.calibration() or {}).get("read_by", {})
        return read_by

    def made_files(self) -> list[str]:
        """Their names, once they are made."""
        return _made(self.calibration() or {})

    def loaded_targets(self) -> StoredTargets:
        """The targets with their files, if these have been made."""
        read_by, kind = self.read_by(), self.targets.logits
        basis = read_by.get(LOGITS, {}).get("basis")
        path = None if basis is None else self.folder / basis
        targets = self.targets.with_logits(
            target_kind(kind.settings(), vocabulary_size=kind.vocabulary_size, basis=path)
        )
        for section, files in read_by.items():
            if "layers" in files:
                layers = LayerFile.load(self.folder / files["layers"])
                targets = targets.with_layer_file(section, layers, longest=self.identity["sequence"]["length"])
        return targets

    def settings(self, dtype: str) -> dict[str, Any]:
        """Returns the settings that the cache's shards share, for a teacher that was loaded in this dtype; see
        `Manifest.settings`."""
        asked = self.identity["teacher"]
        teacher = {key: asked[key] for key in TEACHER_IDENTITY if asked.get(key) is not None}
        return {
            "teacher": {**teacher, "dtype": dtype},
            "tokenizer": self.identity["tokenizer"],
            "sequence": self.identity["sequence"],
        }

    def target_digests(self) -> dict[str, str]:
        """See `Manifest.target_digests`; of targets whose files are made."""
        read_by: ReadBy = {
            section: {role: _sha256_of(self.folder / name) for role, name in files.items()}
            for section, files in self.read_by().items()
        }
        return target_digests(self.identity["targets"], read_by)

    def groups(self, dtype: str, *, targets: StoredTargets) -> tuple[Group, ...]:
        """Returns the column groups of a shard, for a teacher that was loaded in this dtype and captures these targets,
        whose rank may have been chosen by calibration."""
        return groups_of(
            targets,
            layout=layout_of(self.targets),
            settings=fingerprint_of(self.settings(dtype)),
            digests=self.target_digests(),
            read_by=self.read_by(),
        )

    def pending(self) -> list[int]:
        """Units that are still to be computed; records that do not count are removed, so that others can take their place."""
        return pending_units(self)


def _made(calibration: Mapping[str, Any]) -> list[str]:
    return sorted({name for files in calibration.get("read_by", {}).values() for name in files.values()})


@lru_cache(maxsize=8)
def _sha256_of(path: Path) -> str:
    """Hashes a file that is named by its content; cached, because every unit of a process asks for it."""
    return hash_file(path)


def make_plan(recipe: Recipe) -> Plan:
    """Check the recipe against its teacher, stage the corpus, and find what is already done.

    Raises a `UserError` for what can be known before compute is spent: a model or corpus that cannot be read, k above the
    vocabulary, sequences longer than the model's context, chat rows without a template, a folder that holds another job;
    `CacheDamaged` when the job is finished, but files of the cache are missing.
    """
    recipe.require("teacher", "corpus")
    teacher, corpus = recipe.teacher, recipe.corpus
    assert teacher is not None and corpus is not None
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    config = load_config(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    tokens = _describe_tokenizer(tokenizer)
    if corpus.messages_field is not None:
        ChatRenderer(tokenizer)  # raises for a tokenizer without a template
        tokens["chat_template"] = template_fingerprint(tokenizer)
    tokens |= _begins(recipe, tokenizer)
    kind = _target_kind(recipe, config, vocabulary_size=tokens["vocabulary_size"])
    layers = layer_kinds(recipe.targets, config, longest=recipe.sequence.length)
    boundary = BoundaryMass.of(begins_pretoken(tokenizer)) if recipe.targets.boundary_mass else None
    targets = StoredTargets(kind, **layers, boundary=boundary)
    _check_context(recipe, config)
    _check_row_bytes(targets, length=recipe.sequence.length)
    identity = {
        "teacher": {
            "model": find_model(teacher.model).portable_id,
            "dtype": teacher.dtype,
            "attention": teacher.attention,
            **weights_identity(teacher.model, revision=teacher.revision, commit=getattr(config, "_commit_hash", None)),
        },
        "tokenizer": tokens,
        # Defaults of later settings are left out: what an earlier version made with them is the same job.
        "sequence": recipe.sequence.model_dump(exclude_defaults=True) | recipe.sequence.model_dump(include=ALWAYS),
        "targets": targets.settings(),
        "units": recipe.precompute.model_dump(include={"unit_rows", "unit_bytes"}),
    }
    return _find_or_begin(recipe, identity, targets, tokenizer, config)


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocabulary_size": vocabulary_size(tokenizer),
        "pad_id": pad if pad is not None else 0,
        "eos_id": tokenizer.eos_token_id,
    }


def _begins(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Returns the tokens that rows begin with; nothing where neither tokenizer nor recipe puts anything before a text.
    Raises `RecipeError`."""
    sequence = recipe.sequence
    chats = recipe.corpus is not None and recipe.corpus.messages_field is not None
    prefix = row_prefix(tokenizer, sequence.prefix, chats=chats)
    check_room(length=sequence.length, prefix=len(prefix), context=sequence.context)
    stated = prefix or row_prefix(tokenizer, chats=chats) or own_prefix(tokenizer)
    return {"prefix_ids": list(prefix)} if stated else {}


def _check_context(recipe: Recipe, config: Any) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.sequence.length > context:
        raise RecipeError(
            f"sequence.length is {recipe.sequence.length}, but the teacher's context holds {context} tokens; lower it"
        )


def _check_row_bytes(targets: StoredTargets, *, length: int) -> None:
    """Readers take no row that is larger: refused here, before it is computed. Ragged columns count as one entry a position."""
    entries = {"position": length, "token": length, "pair": length * (length + 1) // 2}
    size = int(sum(column.position_bytes * entries[column.of] for column in targets.columns))
    if size > MOST_ROW_BYTES:
        raise RecipeError(
            f"a row of sequence.length {length} would take {size / 2**30:.1f} GiB with all of its targets, and readers take at "
            f"most {MOST_ROW_BYTES // 2**30}; lower sequence.length, or store fewer layers"
        )


def _target_kind(recipe: Recipe, config: Any, *, vocabulary_size: int) -> TargetKind:
    return target_kind(recipe.targets.logits.for_teacher(config), vocabulary_size=vocabulary_size)


def _find_or_begin(
    recipe: Recipe, identity: dict[str, Any], targets: StoredTargets, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Plan:
    folder, corpus, settings = recipe.cache_folder, recipe.corpus, _smaller_units(recipe.precompute, targets)
    assert corpus is not None
    # Where a corpus comes from is no part of its identity: what it holds is.
    corpus_settings = corpus.model_dump(exclude={"limit", "format", "streaming"})
    corpus_settings["source"] = _portable_source(corpus.source)

    def planned(staged: Staged) -> Plan:
        whole = {**identity, "corpus": {**corpus_settings, "digest": staged.digest}}
        return Plan(folder, whole, targets, staged.units, staged.rows_in, staged.deduplicated)

    known = _known_job(folder)
    if known is not None:
        plan = planned(stage(corpus, settings, None))
        if known.has_nothing and known.job != json.loads(json.dumps(plan.identity)):
            _clear(folder)
            known = None
    if known is not None:
        _check_same_job(known, plan.identity, folder)
        plan = replace(plan, files=known.files)
        check_teacher_files(plan)
        return plan
    with empty_folder(folder / WORK_FOLDER / "units") as staging:
        positions = targets.calibration_positions
        plan = planned(stage(corpus, settings, staging, calibration_positions=positions))
        save_teacher_files(folder / "teacher", tokenizer, config, fingerprint=identity["tokenizer"]["fingerprint"])
        if targets.boundary is not None:
            targets.boundary.save(folder / "teacher")
        (plan.work / "done").mkdir()
        plan = replace(plan, files=described(folder, (folder / "teacher").iterdir()))
        job = {"format_version": PLAN_VERSION, "identity": plan.identity, "files": plan.files}
        write_whole(plan.work / PLAN, json.dumps(job, indent=1, sort_keys=True))  # last: now there is a job
    return plan


def _smaller_units(settings: PrecomputeConfig, targets: StoredTargets) -> PrecomputeConfig:
    """Layers take many times what logits do: with them fewer rows share a shard, and its size stays what it is."""
    times = 1 + targets.token_bytes / LOGIT_BYTES
    rows, size = max(1, int(settings.unit_rows / times)), max(1, int(settings.unit_bytes / times))
    return settings.model_copy(update={"unit_rows": rows, "unit_bytes": size})


@dataclass(frozen=True)
class _Known:
    """Identity of a job that a folder holds, finished or not; format 1 says less of it."""

    job: dict[str, Any]
    is_of_format_1: bool = False
    files: list[dict[str, Any]] = field(default_factory=list)  # of an unfinished one: see `Plan.files`
    has_nothing: bool = False  # computed; but rows to blame may have been found


def _known_job(folder: Path) -> _Known | None:
    """The job that the folder holds; refuses folders that hold something else.

    A job that was planned and has computed nothing yet holds nothing that could be lost: it is cleared away, so that a
    recipe can be mended in place. What was found out about rows that fail is kept for the same recipe.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        _check_files(folder, manifest)
        return _Known(manifest.job, manifest.format_version == manifest_v1.FORMAT_VERSION)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    work = folder / WORK_FOLDER
    if not work.is_dir() or any(path.name not in OURS for path in folder.iterdir()):
        raise CacheError(f"{folder} exists and holds no cache of ours; choose another `cache:` or empty it")
    plan = work / PLAN
    has_nothing = not any((folder / "shards").glob("part-*"))
    if plan.is_file() and not (has_nothing and not any((work / "attempts").glob("*.json"))):
        with contextlib.suppress(*((CacheError, CacheDamaged) if has_nothing else ())):
            job = _read_plan(plan, folder)
            return _Known(job["identity"], files=job["files"], has_nothing=has_nothing)
    _clear(folder)
    return None


def _clear(folder: Path) -> None:
    for name in OURS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _read_plan(file: Path, folder: Path) -> dict[str, Any]:
    """plan.json of an unfinished job; raises `CacheError` for that of another version, `CacheDamaged` for one that is none."""
    content = read_json(file)
    if isinstance(content, dict) and content.get("format_version") != PLAN_VERSION:
        raise CacheError(
            f"the job in {folder} was begun by another version of teachercache, whose cache has another format; finish it "
            f"with that version, or {_start_over(folder)}"
        )
    job = read_shaped(file, PLANNED, remedy=_start_over(folder))
    if job is None:
        raise CacheDamaged(f"{file} is no JSON; {_start_over(folder)}")
    return job


def check_teacher_files(plan: Plan) -> None:
    """Raise `CacheDamaged` where a file in teacher/, by which units of an unfinished job were made, has changed since."""
    check_unchanged(plan.folder, plan.files, remedy=_start_over(plan.folder))
    for name in plan.made_files():
        check_named_by_content(plan.folder, name, remedy="delete it and run this command again: it is made anew")


def _start_over(folder: Path) -> str:
    return f"delete {folder} and run this command again"


def _check_files(folder: Path, manifest: Manifest) -> None:
    for info in manifest.all_files:
        if not _is_there(folder, info.file, info.bytes):
            raise CacheDamaged(
                f"the cache at {folder} is finished, but {info.file} is missing or has another size; fetch that file "
                f"again, or delete {folder} and run this command again (`teachercache verify` lists everything)"
            )


def _is_there(folder: Path, file: str, size: int) -> bool:
    path = folder / file
    return path.is_file() and path.stat().st_size == size


def _check_same_job(known: _Known, identity: dict[str, Any], folder: Path) -> None:
    if known.is_of_format_1:  # it says less of what pins a teacher
        known_teacher = known.job["teacher"]
        identity = {
            **identity,
            "teacher": {key: value for key, value in identity["teacher"].items() if key in known_teacher},
        }
    different = sorted(_differences(known.job, identity))
    if different:
        rows = " (other rows: corpus.limit, or the data itself)" if "corpus.digest" in different else ""
        raise CacheError(
            f"the cache at {folder} was made with other settings or data; different: {', '.join(different)}{rows}; "
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


def save_teacher_files(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any, *, fingerprint: str) -> None:
    """Tokenizer and config.json of the teacher, without paths of this machine; checks that the tokenizer survives saving."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    without_paths(folder / "config.json")
    save_tokenizer(folder, tokenizer, fingerprint=fingerprint)
