"""Recipes: one YAML file describes a precompute job, a training job, or both.

Sections and who reads them:

    cache                                        the folder that one job writes and the other reads, there or at a URL
    teacher, corpus, sequence, targets, precompute     `teachercache precompute`
    student, objective, stream, train                  `teachercache train`

Paths in a recipe are relative to the working directory. Configs are frozen; unknown keys are refused with the nearest
valid one; `key.path=value` overrides come from the command line. A cache describes itself: a training recipe never
repeats what was captured.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from teachercache.errors import RecipeError

LOCAL_COPIES = Path("~/.cache/teachercache/shards")
LOCAL_COPIES_BYTES = 50 * 10**9
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(location: str | Path) -> bool:
    """Whether the location of a cache is a URL, such as `s3://BUCKET/PREFIX`; all others are folders."""
    return isinstance(location, str) and _URL.match(location) is not None


class Section(BaseModel):
    """Base of every recipe section: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TeacherConfig(Section):
    """Which model is the teacher and in which precision it runs."""

    model: str = Field(
        description="Hugging Face id, local folder, .gguf file, or package://NAME/FILE in an installed package"
    )
    revision: str | None = Field(None, description="hub commit, tag or branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; for the teacher alone"
    )
    attention: str | None = Field(
        None, description="attn_implementation of transformers: sdpa, eager, flash_attention_2"
    )


class CorpusConfig(Section):
    """Where rows come from. A row is one document or one conversation."""

    source: str = Field(description="dataset name, file, folder or glob; `python-docs` is CPython's own documentation")
    format: Literal["auto", "datasets", "parquet", "jsonl", "text", "python-docs"] = "auto"
    name: str | None = Field(None, description="configuration of a Hugging Face dataset")
    revision: str | None = None
    split: str = Field("train", description="split of a Hugging Face dataset, slices as in train[:10%]")
    streaming: bool = False
    text_field: str = "text"
    messages_field: str | None = Field(
        None, description="chat rows: a list of {role, content}; loss on assistant tokens"
    )
    limit: int | None = Field(None, ge=1, description="read at most so many rows")
    deduplicate: bool = Field(True, description="drop rows whose content occurred before, and count them")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of rows kept for evaluation, chosen by content hash")
    store_text: bool = Field(
        True, description="keep the text beside the tokens; alignment to other tokenizers needs it"
    )


class SequenceConfig(Section):
    """How documents become token sequences."""

    layout: Literal["documents", "packed"] = "documents"
    length: int = Field(512, ge=2, description="most tokens in a sequence; longer documents are windowed, never cut")
    add_eos: bool = Field(True, description="end every text document with the tokenizer's end-of-sequence token")


class GridConfig(Section):
    """Base of kinds that hold the tail log-partition on a temperature grid."""

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0, 4.0, 8.0)
    dtype: Literal["float16", "float32"] = "float16"

    @model_validator(mode="after")
    def _ordered_grid(self) -> GridConfig:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError("temperatures must rise, each once, and hold at least one: [1, 2, 4, 8]")
        if 1.0 not in self.temperatures:
            raise ValueError("temperatures must hold 1: the log-probability of the actual token is taken there")
        return self


class TopKConfig(GridConfig):
    """Top-k logits with the exact tail log-partition on a temperature grid."""

    kind: Literal["top-k"] = "top-k"
    k: int = Field(64, ge=1)


class TopPConfig(GridConfig):
    """As many of the largest logits as hold a share p of the mass, and the exact tail log-partition outside them."""

    kind: Literal["top-p"] = "top-p"
    p: float = Field(0.95, gt=0, le=1, description="mass of a head at T = 1")
    k: int = Field(64, ge=1, description="most tokens of a head, whatever its mass")


class RandomSamplingConfig(Section):
    """Tokens drawn from the teacher with replacement, and how often each came up."""

    kind: Literal["random-sampling"] = "random-sampling"
    draws: int = Field(
        50, ge=1, le=2**16 - 1, description="draws at each position; about 12 to 16 different tokens of 50"
    )
    draw_temperature: float = Field(1.0, gt=0, description="where the sample is unbiased: train at this temperature")


class FullConfig(Section):
    """Every log-probability, for vocabularies of at most 4096 tokens or classes."""

    kind: Literal["full"] = "full"
    dtype: Literal["float16", "float32"] = "float16"


class HiddenConfig(Section):
    """The final hidden state, quantised, and the teacher's output matrix once a cache."""

    kind: Literal["hidden"] = "hidden"
    width: int | None = Field(None, ge=1, description="inputs of the teacher's output layer; default: its hidden_size")
    step: float = Field(
        1 / 32, gt=0, le=1000, description="quantisation step in units of a channel's spread; smaller = larger"
    )
    calibration_positions: int = Field(
        4096, ge=64, description="positions that give means and spreads, drawn from the whole corpus by content hash"
    )


SKETCH_PRESETS: dict[str, dict[str, Any]] = {
    # 59 and 109 bytes a position of SmolLM2-135M (tests/bench/codec_fidelity.py)
    "compact": {"k": 10, "rank": 320, "step": 0.16},
    "fine": {"k": 20, "rank": 384, "step": 0.1},
}


class HeadSketchConfig(Section):
    """The largest logits exactly, the tail's mass at every temperature, and a low-rank sketch of the tail's shape."""

    kind: Literal["head+sketch"] = "head+sketch"
    preset: Literal["compact", "fine"] = Field("compact", description="sets k, rank and step where they are not given")
    k: int = Field(0, ge=1, validate_default=False, description="largest logits kept exactly")
    rank: int | None = Field(
        0, ge=1, validate_default=False, description="directions of the sketch; a narrower model takes its width"
    )
    step: float | None = Field(
        0.0, gt=0, le=1000, validate_default=False, description="quantisation step in logits; smaller = larger"
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="instead of the preset's rank and step: the pair of fewest bytes whose KL(teacher ‖ stored), in nats, is "
        "at most this at T = 1 and 2; a rank or step that is given beside it stays",
    )
    calibration_positions: int = Field(
        16384, ge=64, description="positions that the sketch is fitted to, drawn from the whole corpus by content hash"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = SKETCH_PRESETS.get(values.get("preset", "compact"), {})
        if values.get("target_kl") is not None:
            preset = {**preset, "rank": None, "step": None}
        return {**preset, **values}

    @model_validator(mode="after")
    def _rank_and_step(self) -> HeadSketchConfig:
        if self.target_kl is None and (self.rank is None or self.step is None):
            raise ValueError("rank and step need values, or a target_kl by which calibration chooses them")
        return self


def _kind_of(values: Any) -> str:
    kind = values.get("kind", "head+sketch") if isinstance(values, dict) else getattr(values, "kind", "head+sketch")
    return str(kind)


# Another kind of logit target joins here and in `teachercache.targets.KINDS`.
LogitsConfig = Annotated[
    Annotated[HeadSketchConfig, Tag("head+sketch")]
    | Annotated[TopKConfig, Tag("top-k")]
    | Annotated[TopPConfig, Tag("top-p")]
    | Annotated[RandomSamplingConfig, Tag("random-sampling")]
    | Annotated[FullConfig, Tag("full")]
    | Annotated[HiddenConfig, Tag("hidden")],
    Discriminator(_kind_of),
]
TARGET_KINDS = ("head+sketch", "top-k", "top-p", "random-sampling", "full", "hidden")


class TargetsConfig(Section):
    """What is stored of the teacher."""

    logits: LogitsConfig = Field(default_factory=lambda: HeadSketchConfig.model_validate({}))


class PrecomputeConfig(Section):
    """How the Ray Data job runs. `unit_rows` and `unit_bytes` decide which rows share a shard; they are part of
    a cache's fingerprint. `positions_per_batch` and `threads_per_actor` decide how floats are rounded, nothing else: with
    both the same, any number of actors gives identical shards."""

    actors: int = Field(1, ge=1, description="teacher actors, one model each")
    gpus_per_actor: float = Field(0, ge=0)
    threads_per_actor: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one actor; default: all cores, so set it for several on CPUs",
    )
    positions_per_batch: int = Field(2048, ge=1, description="tokens in one forward pass, padding included")
    unit_rows: int = Field(1024, ge=1, description="a work unit (= a shard) closes at so many rows")
    unit_bytes: int = Field(4 * 2**20, ge=1, description="... or at so many bytes of text")
    address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")


class LoraConfig(Section):
    """Low-rank adapters instead of all weights, through peft (Hu et al. 2022)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="names of layers, or all-linear: every linear layer but the output layer"
    )


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder, e.g. one that `teachercache init-student` made")
    revision: str | None = None
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters; the exported student has them merged into its weights"
    )


class ObjectiveConfig(Section):
    """`L = alpha * T^2 * D(teacher_T, student_T) + (1 - alpha) * CE` (Hinton, Vinyals & Dean 2015)."""

    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0, description="any T >= 1; with targets on a grid, one of it")
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"] = Field(
        "forward-kl", description="D: forward-kl covers all that the teacher does, reverse-kl seeks its main mode"
    )
    mixing: float = Field(
        0.5, gt=0, lt=1, description="the teacher's share in the mixture of jensen-shannon; 0.5 is the symmetric one"
    )
    tail: Literal["auto", "ghost", "uniform", "renormalise", "sketch"] = Field(
        "auto",
        description="tokens outside the head: one bucket with their exact mass (ghost), alike (uniform), dropped "
        "(renormalise) or each with its own share (sketch); auto: sketch, ghost "
        "or renormalise, the first that the targets allow",
    )

    @model_validator(mode="after")
    def _finite_divergence(self) -> ObjectiveConfig:
        if self.divergence == "reverse-kl" and self.tail == "renormalise":
            raise ValueError(
                "reverse-kl is infinite against a tail of mass zero, which renormalise makes; use tail: ghost or uniform"
            )
        return self


def _folder_or_url(location: Any) -> Any:
    if not is_url(location):
        return Path(location) if isinstance(location, str) else location
    authority = location.partition("://")[2].partition("/")[0]
    if ":" in authority.partition("@")[0] and "@" in authority:
        raise ValueError(
            "a URL must not hold credentials, which would be written into run folders; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return location


# A folder, or a URL such as s3://BUCKET/PREFIX.
CacheLocation = Annotated[Path | str, BeforeValidator(_folder_or_url)]


class MixConfig(Section):
    """A further cache that the student learns from beside the recipe's `cache`; its tokenizer must be the same."""

    cache: CacheLocation
    share: float | None = Field(
        None, gt=0, lt=1, description="of the rows in training; default: a row of it comes as often as one of `cache`"
    )


class StreamConfig(Section):
    """How rows come out of caches. A cache in an object store is read through local copies of its files, which all
    processes and jobs of a machine share."""

    window: int = Field(
        64,
        ge=1,
        description="shards whose rows are shuffled together (shards are shuffled too); a reader needs two windows at a time",
    )
    mix: tuple[MixConfig, ...] = Field((), description="further caches; an epoch is one pass over `cache`")
    local: Path = Field(LOCAL_COPIES, description="folder of the local copies, on a fast disk")
    local_bytes: ByteSize = Field(
        ByteSize(LOCAL_COPIES_BYTES),
        ge=1,
        description="most bytes of local copies, e.g. 50 GB; the longest unused go first",
    )


class TrainConfig(Section):
    """The training job: `transformers.Trainer` under DeepSpeed ZeRO."""

    output: Path = Field(description="run folder: checkpoints, logs, and the exported student in OUTPUT/student")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="overrides epochs")
    global_batch: int = Field(16, ge=1, description="rows in one optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="rows in one forward pass of one process")
    pack: bool = Field(
        False,
        description="put short rows of a micro-batch into one sequence, isolated from each other, instead of padding",
    )
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: Path | None = Field(
        None, description="a DeepSpeed JSON file of your own; wins over zero_stage and precision"
    )
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: int | None = Field(None, ge=1, description="steps; default: once an epoch")
    save_every: int | None = Field(None, ge=1, description="steps; default: as evaluate_every")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints to keep; the best one is kept besides")
    log_every: int = Field(10, ge=1)
    loader_workers: int = Field(1, ge=0, description="background processes that decode batches")
    trackers: tuple[str, ...] = Field(("tensorboard",), description="experiment trackers of transformers, or none")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self


class Recipe(Section):
    """A whole recipe. Each command names the sections that it needs with `require`."""

    cache: CacheLocation = Field(
        description="a folder; for training and evaluation also a URL, e.g. s3://BUCKET/PREFIX"
    )
    teacher: TeacherConfig | None = None
    corpus: CorpusConfig | None = None
    sequence: SequenceConfig = SequenceConfig()
    targets: TargetsConfig = TargetsConfig()
    precompute: PrecomputeConfig = PrecomputeConfig()
    student: StudentConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    stream: StreamConfig = StreamConfig()
    train: TrainConfig | None = None

    @property
    def cache_folder(self) -> Path:
        """The cache where it is written. Raises `RecipeError` for a URL."""
        if isinstance(self.cache, str):
            raise RecipeError(
                f"cache: {self.cache} is a URL, and precompute writes to a folder; set -s cache=FOLDER and copy that "
                "afterwards, its manifest.json last"
            )
        return self.cache

    def require(self, *sections: str) -> None:
        """Raise `RecipeError` when a section that a command needs is absent."""
        for section in sections:
            if getattr(self, section) is None:
                raise RecipeError(
                    f"the recipe has no `{section}:` section, which this command needs; see jobs/recipes/"
                )


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys, and a section that is there twice would be half ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"`{twice}` is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key.path=value` overrides (values are YAML) and validate it.

    Raises `RecipeError` with one line: the file, the key, what is wrong, and the nearest valid key.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist; complete ones are in jobs/recipes/")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, not {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return parse_recipe(data, origin=str(path))


def parse_recipe(data: dict[str, Any], *, origin: str) -> Recipe:
    """Validate a recipe that is already a mapping; `origin` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} must read key.path=value")
    *parents, leaf = key.split(".")
    node = data
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: `{part}` is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not YAML") from None


def _explain(item: Any) -> str:
    # A kind of targets is a step of its own in pydantic's path, and no key of the recipe.
    location = ".".join(str(part) for part in item["loc"] if part not in TARGET_KINDS)
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        valid = _keys_at([str(part) for part in parents])
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key `{location}`; {hint}"
    if item["type"] == "missing":
        return f"`{location}` is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"`{location}`: {message[0].lower()}{message[1:]} (got {item['input']!r})" if location else message


def _keys_at(parents: Sequence[str]) -> list[str]:
    sections: list[type[BaseModel]] = [Recipe]
    for part in (part for part in parents if not part.isdigit()):  # an item of a list
        # Where kinds share a key, the path of an error names the kind as well: targets.logits.top-k.
        named = [
            section
            for section in sections
            if "kind" in section.model_fields and section.model_fields["kind"].default == part
        ]
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = named or [model for field in fields for model in _models_in(field.annotation)]
    return list(sections[0].model_fields) if sections else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    bare = [getattr(each, "__origin__", each) for each in (annotation, *get_args(annotation))]  # out of `Annotated`
    return [each for each in bare if isinstance(each, type) and issubclass(each, BaseModel)]
