"""Plan of a precompute job, before any compute is spent.

Equal identities of jobs mean equal inputs and settings. Planning checks the recipe against
its teacher, counts the corpus unless it looks as it did (planning/), and decides between a new job, one to resume, and a
finished one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.cache.files.column_groups import Group, ReadBy, groups_of, layout_of, target_digests
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import FileInfo
from teachercache.cache.manifest import manifest_v1
from teachercache.cache.manifest.manifest import MANIFEST, WORK_FOLDER, manifest_in
from teachercache.cache.manifest.model import TEACHER_IDENTITY, Manifest
from teachercache.cache.stores.choice import store_at, store_beside
from teachercache.cache.stores.copies import file_of, put_folder, scratch_folder
from teachercache.cache.stores.store import Store, place
from teachercache.cache.verify import CARD
from teachercache.config import CorpusConfig, PrecomputeConfig, Recipe
from teachercache.corpus.chat import ChatRenderer
from teachercache.corpus.windows import check_room
from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.models.loading import (
    find_model,
    load_config,
    load_tokenizer,
    save_tokenizer,
    weights_identity,
    without_paths,
)
from teachercache.models.rotary import most_positions
from teachercache.precompute.capture.attempts import ATTEMPTS
from teachercache.precompute.capture.layers import layer_kinds
from teachercache.precompute.capture.shapes import CALIBRATION, INPUT_FORM, PLANNED, RECORD, SEEN
from teachercache.precompute.engine.records import (
    Records,
    check_named_by_content,
    check_unchanged,
    read_json,
    read_shaped,
)
from teachercache.precompute.planning.counted import DOCUMENTS, Counts, count_corpus, counted_corpus
from teachercache.precompute.planning.each import Each, in_turn
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.sources import look_of
from teachercache.precompute.planning.unit_table import UnitSize
from teachercache.targets import BoundaryMass, LayerFile, StoredTargets, TargetKind, target_kind
from teachercache.targets.coding.columns import MOST_ROW_BYTES
from teachercache.targets.stored import LOGITS
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint, vocabulary_size
from teachercache.tokens.prefix import own_prefix, row_prefix
from teachercache.tokens.pretokens import begins_pretoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teachercache.corpus.documents import Document

TEACHER = "teacher"
PLAN = f"{WORK_FOLDER}/plan.json"
CALIBRATION_FILE = f"{WORK_FOLDER}/calibration.json"  # written once basis and layer files are in place
DONE = f"{WORK_FOLDER}/done"  # records of finished units
INPUT_FILE = f"{WORK_FOLDER}/input.json"  # written once it is measured how the teacher takes the rows' beginnings
PLAN_VERSION = (
    3  # of what an unfinished job writes; the plans of format 1 say none, those of 2 had a copy of the corpus
)
LOGIT_BYTES = 64  # about what a token's logits take, which the defaults of `unit_rows` and `unit_bytes` are chosen for
ALWAYS = {"layout", "length", "add_eos"}  # settings of `sequence` that every manifest has
# What an unfinished job may leave where the cache is to be.
OURS = {WORK_FOLDER, TEACHER, "shards", "targets", "quarantine", "index"}


@dataclass(frozen=True)
class Plan:
    """A planned job. `identity` is all that decides what the cache will hold; `counted` is the folder in the store that says
    where its units are in the corpus. Everything below `.work/` is gone once the manifest is committed."""

    store: Store
    identity: dict[str, Any]
    targets: StoredTargets
    units: int
    rows_in: int
    deduplicated: int
    # In teacher/, as planning wrote them: file, bytes, sha256.
    files: list[dict[str, Any]] = field(default_factory=list)
    counted: str = ""
    look: str = ""  # of the corpus, when it was counted: see `look_of`
    mended: str = ""  # a line that says what of an unfinished job was damaged, and is made again

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that every row and every packed segment begins with."""
        return tuple(self.identity["tokenizer"].get("prefix_ids", ()))

    def documents(self, unit: int) -> list[Document]:
        """The documents of a unit, from their source. Raises `CorpusError` where that has changed."""
        return counted_corpus(Shelf(self.store, self.counted)).documents(unit)

    def sample(self) -> list[Document]:
        """Documents drawn from the whole corpus by content hash, for calibration."""
        return counted_corpus(Shelf(self.store, self.counted)).sample()

    def records(self) -> Records:
        """Records of finished units, each written once the unit's shard is in place."""
        layout, read_by = set(layout_of(self.targets)), self.read_by()

        def counts(name: str, record: dict[str, Any]) -> bool:
            if record["shard"] and set(record["shard"]["files"]) != layout:
                raise CacheDamaged(
                    f"{place(self.store, name)} is of other column groups than this job has; delete it and run the same "
                    "command again: this unit is computed again"
                )
            # Prepared anew, other files would read its codes as other numbers; planned anew, because the plan was damaged, the
            # recipe may be another one by now.
            return bool(record["read_by"] == read_by and record.get("job", self.job) == self.job)

        return Records(self.store, DONE, self.units, RECORD, counts)

    @property
    def job(self) -> str:
        """Fingerprint of the job's identity, which its records carry."""
        return fingerprint_of(self.identity)

    def calibration(self) -> dict[str, Any] | None:
        """Returns the rows that basis and layer files were made from, and these files; {} for targets without, None
        when it is due."""
        if not self.targets.needs_preparation:
            return {}
        record = read_shaped(
            self.store,
            CALIBRATION_FILE,
            CALIBRATION,
            remedy="delete it and run the same command again: it calibrates anew",
        )
        if record is None or record.get("job", self.job) != self.job:
            return None
        return record if set(_made(record)) <= self.store.list(f"{TEACHER}/").keys() else None

    def input_form(self) -> dict[str, Any]:
        """Returns the measured losses of input forms (input_form.py); {} before they are measured."""
        remedy = "delete it and run the same command again"
        return read_shaped(self.store, INPUT_FILE, INPUT_FORM, remedy=remedy) or {}

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
        name = read_by.get(LOGITS, {}).get("basis")
        with nullcontext() if name is None else file_of(self.store, name) as basis:
            loaded = target_kind(kind.settings(), vocabulary_size=kind.vocabulary_size, basis=basis)
        targets = self.targets.with_logits(loaded)
        for section, files in read_by.items():
            if "layers" in files:
                with file_of(self.store, files["layers"]) as path:
                    layers = LayerFile.load(path)
                targets = targets.with_layer_file(section, layers, longest=self.identity["sequence"]["length"])
        return targets

    def settings(self, dtype: str) -> dict[str, Any]:
        """See `settings_of`."""
        return settings_of(self.identity, dtype)

    def target_digests(self) -> dict[str, str]:
        """See `Manifest.target_digests`; of targets whose files are made."""
        read_by: ReadBy = {
            section: {role: made_file(self.store, name).sha256 for role, name in files.items()}
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
        return self.records().pending()


def _made(calibration: Mapping[str, Any]) -> list[str]:
    return sorted({name for files in calibration.get("read_by", {}).values() for name in files.values()})


@lru_cache(maxsize=8)
def made_file(store: Store, name: str) -> FileInfo:
    """Size and digest of a file that is named by its content; cached, because every unit of a process asks for it."""
    return file_in(store, name)


def file_in(store: Store, name: str) -> FileInfo:
    """Size and digest of a file."""
    data = store.get(name)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def make_plan(recipe: Recipe, *, store: Store | None = None, each: Each = in_turn, recheck: bool = False) -> Plan:
    """Check the recipe against its teacher, count the corpus, and find what is already done. `each` runs what can run at the
    same time; with `recheck` a corpus is read again that looks as it did; `store` is that of the cache, where the recipe's
    location is not to be opened for it.

    Raises a `UserError` for what can be known before compute is spent: a model or corpus that cannot be read, k above the
    vocabulary, sequences longer than the model's context, chat rows without a template, a folder that holds another job;
    `CacheDamaged` when the job is finished, but files of the cache are missing.
    """
    identity, targets, tokenizer, config = asked_of(recipe)
    assert recipe.corpus is not None
    size = unit_size(recipe.precompute, targets)
    job = _Asked(recipe.cache, store or store_at(recipe.cache), recipe.corpus, identity, targets, size, each)
    known = _known_job(job.store, job.location)
    if known is not None and known.is_lost:
        return _planned_again(job, tokenizer, config)
    plan = None if known is None else _gone_on_with(known, job, recheck=recheck)
    return plan or _begun(job, tokenizer, config)


def settings_of(identity: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the settings that a cache's shards share, for a teacher that was loaded in this dtype; see
    `Manifest.settings`."""
    asked = identity["teacher"]
    teacher = {key: asked[key] for key in TEACHER_IDENTITY if asked.get(key) is not None}
    return {
        "teacher": {**teacher, "dtype": dtype},
        "tokenizer": identity["tokenizer"],
        "sequence": identity["sequence"],
    }


def asked_of(recipe: Recipe) -> tuple[dict[str, Any], StoredTargets, PreTrainedTokenizerBase, Any]:
    """The job that a recipe asks for, whatever its corpus holds: its identity but for the corpus, the targets, the teacher's
    tokenizer and config. Raises as `make_plan` does."""
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
    return identity, targets, tokenizer, config


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
    context = most_positions(config)
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


@dataclass(frozen=True)
class _Asked:
    """The job that a recipe asks for."""

    location: Path | str  # of the cache
    store: Store  # which the cache is to be in
    corpus: CorpusConfig
    identity: dict[str, Any]  # without that of the corpus
    targets: StoredTargets
    size: UnitSize
    each: Each

    def planned(self, counts: Counts, *, counted: str, look: str) -> Plan:
        """The plan, for a corpus that was counted."""
        # Where a corpus comes from is no part of its identity: what it holds is.
        settings = self.corpus.model_dump(exclude={"limit", "format", "streaming"})
        settings["source"] = portable_source(self.corpus.source)
        whole = {**self.identity, "corpus": {**settings, "digest": counts.digest}}
        totals = (counts.units, counts.rows_in, counts.deduplicated)
        return Plan(self.store, whole, self.targets, *totals, counted=counted, look=look)

    def counted_anew(self, look: str) -> Plan:
        """The plan, after a pass over the corpus; what that leaves goes where it fails."""
        shelf = Shelf(self.store, f"{WORK_FOLDER}/corpus-{uuid.uuid4().hex[:12]}")
        try:
            counts = count_corpus(
                self.corpus, self.size, shelf, calibration_positions=self.targets.calibration_positions, each=self.each
            )
        except BaseException:
            shelf.clear()
            raise
        return self.planned(counts, counted=shelf.within, look=look)


def _begun(job: _Asked, tokenizer: PreTrainedTokenizerBase, config: Any) -> Plan:
    """A new job: its corpus, the files that all shards share and, last, what says so."""
    try:
        return _with_shared_files(job.counted_anew(look_of(job.corpus)), tokenizer, config)
    except BaseException:  # nothing is left of what was no job yet
        _clear(job.store)
        raise


def _with_shared_files(plan: Plan, tokenizer: PreTrainedTokenizerBase, config: Any) -> Plan:
    """The plan with the files that all shards share, which are written, and it after them."""
    with scratch_folder() as folder:
        save_teacher_files(folder, tokenizer, config, fingerprint=plan.identity["tokenizer"]["fingerprint"])
        if plan.targets.boundary is not None:
            plan.targets.boundary.save(folder)
        plan = replace(plan, files=[vars(info) for info in put_folder(plan.store, folder, TEACHER)])
    _put_plan(plan)
    return plan


def _planned_again(job: _Asked, tokenizer: PreTrainedTokenizerBase, config: Any) -> Plan:
    """The plan of a job whose plan cannot be read any more; its finished units stay."""
    plan = job.counted_anew(look_of(job.corpus))
    try:
        _check_records(plan)
    except BaseException:
        Shelf(job.store, plan.counted).clear()
        raise
    mended = f"{place(job.store, PLAN)} was damaged: the job is planned again, and goes on with its finished units"
    return replace(_with_shared_files(plan, tokenizer, config), mended=mended)


def _check_records(plan: Plan) -> None:
    """Raise `CacheError` where finished units are of another job than this recipe's; its plan cannot say so any more."""
    records = (read_json(plan.store, name) for name in plan.store.list(f"{DONE}/"))
    if {record.get("job", plan.job) for record in records if isinstance(record, dict)} - {plan.job}:
        raise CacheError(
            f"{plan.store.name} holds finished units of another recipe, or of other data, and its plan is damaged; run the "
            f"recipe that it was begun with, choose another `cache:`, or {_start_over(plan.store)}"
        )


def _gone_on_with(known: _Known, job: _Asked, *, recheck: bool) -> Plan | None:
    """The plan of the job that the store holds, whose corpus is read again where it looks other than it did; None where it is
    another job that has computed nothing, which is cleared away. Raises `CacheError` for any other."""
    look = look_of(job.corpus)
    is_seen = known.counts is not None and known.look == look and not recheck
    if known.counts is not None and is_seen:
        plan = job.planned(known.counts, counted=known.counted, look=look)
    else:
        plan = job.counted_anew(look)
    if known.has_nothing and known.job != json.loads(json.dumps(plan.identity)):
        _clear(job.store)
        return None
    plan = replace(plan, files=known.files, mended=known.mended)
    try:
        _check_same_job(known, plan.identity, job.store)
        check_teacher_files(plan)
    except BaseException:
        if not is_seen:
            Shelf(job.store, plan.counted).clear()
        raise
    if not is_seen:
        _keep_counts(known, plan, job.location)
    return plan


def _keep_counts(known: _Known, plan: Plan, location: Path | str) -> None:
    """Keep the counts of a corpus that was read again and holds what it did."""
    if known.is_finished:
        remember(plan, location)
        Shelf(plan.store, plan.counted).clear()
    else:
        _put_plan(plan)
        Shelf(plan.store, known.counted).clear()


def _put_plan(plan: Plan) -> None:
    counted = {
        "within": plan.counted,
        "look": plan.look,
        **{name: getattr(plan, name) for name in ("units", "rows_in", "deduplicated")},
        "files": [
            vars(file_in(plan.store, name))
            for name in plan.store.list(f"{plan.counted}/")
            if "/" not in name.removeprefix(f"{plan.counted}/")
        ],
        "staged": len(plan.store.list(f"{plan.counted}/{DOCUMENTS}/")),
    }
    job = {"format_version": PLAN_VERSION, "identity": plan.identity, "files": plan.files, "counted": counted}
    job["digest"] = fingerprint_of(job)
    plan.store.put(PLAN, json.dumps(job, indent=1, sort_keys=True).encode())


def remember(plan: Plan, location: Path | str) -> None:
    """Keep what the corpus of a finished cache looked like, beside it: running the job again then need not read it. The cache
    itself holds what its manifest lists, and no times of files."""
    seen = {"look": plan.look, "digest": plan.identity["corpus"]["digest"]}
    beside = store_beside(location)
    if beside is not None:
        store, name = beside
        store.put(_seen(name), json.dumps(seen).encode())


def _seen(cache: str) -> str:
    return f".{cache}.corpus.json"


def unit_size(settings: PrecomputeConfig, targets: StoredTargets) -> UnitSize:
    """Layers take many times what logits do: with them fewer rows share a shard, and its size stays what it is."""
    times = 1 + targets.token_bytes / LOGIT_BYTES
    return UnitSize(max(1, int(settings.unit_rows / times)), max(1, int(settings.unit_bytes / times)))


@dataclass(frozen=True)
class _Known:
    """Identity of a job that a folder holds, finished or not; format 1 says less of it."""

    job: dict[str, Any]
    is_of_format_1: bool = False
    is_finished: bool = False
    counts: Counts | None = None  # of its corpus; None where they are not known
    counted: str = ""  # see `Plan`, as `look` and, of an unfinished one, `files`
    look: str = ""
    files: list[dict[str, Any]] = field(default_factory=list)
    has_nothing: bool = False  # computed; but rows to blame may have been found
    is_lost: bool = False  # an unfinished one, whose plan cannot be read any more
    mended: str = ""  # see `Plan`


def _known_job(store: Store, location: Path | str) -> _Known | None:
    """The job that the store holds; refuses what holds something else.

    A job that was planned and has computed nothing yet holds nothing that could be lost: it is cleared away, so that a
    recipe can be mended in place. What was found out about rows that fail is kept for the same recipe.
    """
    sizes = store.list()
    if MANIFEST in sizes:
        manifest = manifest_in(store)
        _check_files(store, manifest, sizes)
        return _finished(manifest, location)
    if not sizes:
        return None
    if (
        not any(name.startswith(f"{WORK_FOLDER}/") for name in sizes)
        or {name.partition("/")[0] for name in sizes} - OURS - {CARD}  # the card comes just before the manifest
    ):
        raise CacheError(f"{store.name} exists and holds no cache of ours; choose another `cache:` or empty it")
    has_nothing = not any(name.startswith("shards/part-") for name in sizes)
    if not (has_nothing and not any(map(_is_attempt, sizes))):
        with contextlib.suppress(*((CacheError, CacheDamaged) if has_nothing else ())):
            job = _read_plan(store)
            return _Known({}, is_lost=True) if job is None else _unfinished(job, store, has_nothing=has_nothing)
    _clear(store)
    return None


def _finished(manifest: Manifest, location: Path | str) -> _Known:
    job, is_of_format_1 = manifest.job, manifest.format_version == manifest_v1.FORMAT_VERSION
    remedy = "delete it and run the same command again: the corpus is read again"
    beside = store_beside(location)
    seen = None if beside is None else read_shaped(beside[0], _seen(beside[1]), SEEN, remedy=remedy)
    if seen is None or seen["digest"] != job["corpus"]["digest"]:
        return _Known(job, is_of_format_1, is_finished=True)
    counts = Counts(len(manifest.shards), manifest.audit.rows_in, manifest.audit.deduplicated, seen["digest"])
    return _Known(job, is_of_format_1, is_finished=True, counts=counts, look=seen["look"])


def _unfinished(job: dict[str, Any], store: Store, *, has_nothing: bool) -> _Known:
    counted, digest = job["counted"], job["identity"]["corpus"]["digest"]
    is_whole = _is_whole(counted, store)
    counts = Counts(counted["units"], counted["rows_in"], counted["deduplicated"], digest)
    return _Known(
        job["identity"],
        counts=counts if is_whole else None,
        mended="" if is_whole else f"{place(store, counted['within'])} was damaged: the corpus is read again",
        counted=counted["within"],
        look=counted["look"],
        files=job["files"],
        has_nothing=has_nothing,
    )


def _is_whole(counted: Mapping[str, Any], store: Store) -> bool:
    """Tells whether all is there that says where units are. Documents of a staged corpus are checked by whoever reads them,
    and removed where they are damaged (staged.py)."""
    staged = len(store.list(f"{counted['within']}/{DOCUMENTS}/"))
    try:
        check_unchanged(store, counted["files"], remedy="")
    except CacheDamaged:
        return False
    return bool(staged == counted.get("staged", staged))


def _is_attempt(name: str) -> bool:
    return name.startswith(f"{ATTEMPTS}/") and name.endswith(".json")


def _clear(store: Store) -> None:
    ours = [name for name in store.list() if name.partition("/")[0] in OURS]
    work = [name for name in ours if name.startswith(f"{WORK_FOLDER}/")]
    store.delete(*(set(ours) - set(work)))
    store.delete(*work)  # last: by it the rest is known to be ours
    store.sweep()


def _read_plan(store: Store) -> dict[str, Any] | None:
    """plan.json of an unfinished job; None where it is gone or has other bytes than the job wrote. Raises `CacheError` for that
    of another version, `CacheDamaged` for one that is none."""
    content = read_json(store, PLAN)
    if not isinstance(content, dict):
        return None
    digest = content.pop("digest", None)  # earlier ones have none
    if digest is not None and digest != fingerprint_of(content):
        return None
    if content.get("format_version") != PLAN_VERSION:
        raise CacheError(
            f"the job in {store.name} was begun by another version of teachercache, which keeps unfinished jobs otherwise; "
            f"finish it with that version, or {_start_over(store)}"
        )
    return read_shaped(store, PLAN, PLANNED, remedy=_start_over(store))


def check_teacher_files(plan: Plan) -> None:
    """Raise `CacheDamaged` where a file in teacher/, by which units of an unfinished job were made, has changed since."""
    check_unchanged(plan.store, plan.files, remedy=_start_over(plan.store))
    for name in plan.made_files():
        check_named_by_content(plan.store, name, remedy="delete it and run this command again: it is made anew")


def _start_over(store: Store) -> str:
    return f"delete {store.name} and run this command again"


def _check_files(store: Store, manifest: Manifest, sizes: Mapping[str, int]) -> None:
    for info in manifest.all_files:
        if sizes.get(info.file) != info.bytes:
            raise CacheDamaged(
                f"the cache at {store.name} is finished, but {info.file} is missing or has another size; fetch that file "
                f"again, or delete {store.name} and run this command again (`teachercache verify` lists everything)"
            )


def _check_same_job(known: _Known, identity: dict[str, Any], store: Store) -> None:
    if known.is_of_format_1:  # it says less of what pins a teacher
        known_teacher = known.job["teacher"]
        identity = {
            **identity,
            "teacher": {key: value for key, value in identity["teacher"].items() if key in known_teacher},
        }
    different = sorted(_differences(known.job, identity))
    if different:
        rows = " (other rows: corpus.limit, or the data itself)" if "corpus.digest" in different else ""
        grow = "; -s precompute.grow=true adds rows that are new" if different == ["corpus.digest"] else ""
        raise CacheError(
            f"the cache at {store.name} was made with other settings or data; different: {', '.join(different)}{rows}; "
            f"choose another `cache:`, or delete that one to start over{grow}"
        )


def _differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            yield from _differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(left) != json.dumps(right):
        yield path


def portable_source(source: str) -> str:
    """The name of a corpus without the path of this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def save_teacher_files(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any, *, fingerprint: str) -> None:
    """Tokenizer and config.json of the teacher, without paths of this machine; checks that the tokenizer survives saving."""
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    without_paths(folder / "config.json")
    save_tokenizer(folder, tokenizer, fingerprint=fingerprint)
