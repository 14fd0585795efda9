"""A whole recipe, from YAML and `key.path=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from teachercache.config.location import CacheLocation
from teachercache.config.objective import ObjectiveConfig
from teachercache.config.phases import PhaseConfig
from teachercache.config.precompute import CorpusConfig, PrecomputeConfig, SequenceConfig, TeacherConfig
from teachercache.config.targets import TargetsConfig
from teachercache.config.teachers import TeachersConfig
from teachercache.config.training import StreamConfig, StudentConfig, TrainConfig
from teachercache.errors import RecipeError
from teachercache.schedules.known import NUMBER
from teachercache.section import OrAdded, Section


class Recipe(Section):
    """A whole recipe. Each command names the sections that it needs with `require`."""

    cache: CacheLocation = Field(
        description="a folder, or the URL of a place in an object store, e.g. s3://BUCKET/PREFIX"
    )
    teacher: TeacherConfig | None = Field(
        None, description="the model that teaches; read by `precompute`, `evaluate` and `fidelity`"
    )
    corpus: CorpusConfig | None = Field(None, description="the text that it reads; read by `precompute` and `sample`")
    sequence: SequenceConfig = Field(
        SequenceConfig(), description="how text becomes rows of tokens; read by `precompute`"
    )
    targets: TargetsConfig = Field(TargetsConfig(), description="what is stored of the teacher; read by `precompute`")
    precompute: PrecomputeConfig = Field(PrecomputeConfig(), description="how the Ray Data job runs")
    align: tuple[str, ...] = Field(
        (),
        description="models whose tokenizers students have: precompute aligns the cache with each, as `teachercache align`",
    )
    student: StudentConfig | None = Field(
        None, description="the model that learns; read by `train`, `evaluate` and `sample`"
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="what the student minimises; read by `train`")
    teachers: TeachersConfig | None = Field(
        None, description="further teachers of the text of `cache`, learned from together"
    )
    stream: StreamConfig = Field(StreamConfig(), description="how rows come out of caches; read by `train`")
    train: TrainConfig | None = Field(
        None, description="how the training job runs; read by `train`, `evaluate` and `sample`"
    )
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="parts of the run's steps, in order, each with what it changes of objective, stream and train"
    )

    @model_validator(mode="after")
    def _phases_by_name(self) -> Recipe:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: two are called {max(names, key=names.count)}; rename one")
        return self

    @model_validator(mode="after")
    def _flash_kernels_in_half_precision(self) -> Recipe:
        models = {}
        if self.student is not None and self.train is not None and self.train.deepspeed is None:
            models["student"] = (self.student.attention, self.train.precision == "fp32", "train.precision: bf16")
        if self.teacher is not None:
            models["teacher"] = (self.teacher.attention, self.teacher.dtype == "float32", "teacher.dtype: bfloat16")
        for name, (attention, is_single, remedy) in models.items():
            if is_single and "flash" in (attention or ""):
                raise ValueError(
                    f"{name}.attention: {attention} computes in half precision alone; set {remedy}, or {name}.attention: sdpa"
                )
        return self

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
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}; mend that line") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, not {type(data).__name__}; see jobs/recipes/")
    for override in overrides:
        _apply_override(data, override)
    return parse_recipe(data, origin=str(path))


def parse_recipe(data: dict[str, Any], *, origin: str) -> Recipe:
    """Validate a recipe that is already a mapping; `origin` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A list that is too short once its wrong items are gone is no mistake of its own.
        faults = error.errors()
        told = [item for item in faults if item["type"] != "too_short"] or faults
        raise RecipeError(f"recipe {origin}: " + "; ".join(_explain(item) for item in told)) from None


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
            raise RecipeError(f"override {override!r}: `{part}` is a value, not a section; end the path there")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not YAML; put quotes around it") from None


def _explain(item: Any) -> str:
    keys, sections, others = _walked(item["loc"])
    location = ".".join(keys)
    if item["type"] == "extra_forbidden":
        return _unknown_key(location, str(item["loc"][-1]), sections, others)
    if item["type"] == "missing":
        return f"`{location}` is missing; add it"
    if item["type"] == "union_tag_invalid":
        first, _, tags = item["ctx"]["expected_tags"].partition(", ")
        if first != f"'{NUMBER}'":
            return f"`{location}`: its `kind` must be one of {first}, {tags} (got {item['input']!r})"
        key = "`schedule` or `balance`" if "'ratio'" in tags else "`schedule`"
        return f"`{location}`: must be a number, or a section whose {key} is one of {tags} (got {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ")
    return f"`{location}`: {message[0].lower()}{message[1:]} (got {item['input']!r})" if location else message


def _unknown_key(
    location: str, key: str, sections: Sequence[type[BaseModel]], others: Sequence[type[BaseModel]]
) -> str:
    owners = [_called(section) for section in others if key in section.model_fields]
    if owners:
        return f"`{location}` is of {' or '.join(owners)}; leave it out, or choose that"
    valid = list(sections[0].model_fields) if sections else []
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key `{location}`; {hint}"


def _walked(path: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
    """The keys of a path of pydantic's, the sections in which it looked for the last one, and the others that might have stood
    there in the place of one that was chosen.

    Which of several sections stands at a key is a step of its own in such a path, and no key of the recipe.
    """
    keys: list[str] = []
    within: list[type[BaseModel]] = []
    others: list[type[BaseModel]] = []
    sections: list[type[BaseModel]] = [Recipe]
    for step in map(str, path):
        fields = [section.model_fields[step] for section in sections if step in section.model_fields]
        named = [section for section in sections if _is_called(section, step)]
        if fields:
            within, others, sections = sections, [], [model for field in fields for model in sections_of(field)]
        elif named:
            others, sections = [section for section in sections if section not in named], named
        elif not step.isdigit():  # an item of a list
            within = sections
        if fields or not (named or step == NUMBER):
            keys.append(step)
    return keys, within, others


CHOOSING = ("kind", "match", "schedule", "balance")


def _is_called(section: type[BaseModel], name: str) -> bool:
    """Tells whether this section of a union is the one that a `kind`, `schedule` or `balance` chooses."""
    chosen_by = [section.model_fields[key] for key in CHOOSING if key in section.model_fields]
    return any(name in (field.default, *get_args(field.annotation)) for field in chosen_by)


def _called(section: type[BaseModel]) -> str:
    """The key and the name that choose this section of a union, as `kind: NAME`."""
    key = next(key for key in CHOOSING if key in section.model_fields)
    return f"{key}: {get_args(section.model_fields[key].annotation)[0]}"


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Lists the sections that may stand at a key of a section, those from outside the package included."""
    return list(dict.fromkeys(model for part in (field.annotation, *field.metadata) for model in models_in(part)))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Sections of a type, through unions, lists and `Annotated`."""
    if isinstance(annotation, OrAdded):
        return list(annotation.added().values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = (getattr(annotation, "__origin__", None), *get_args(annotation))
    models = [model for part in inner if part is not None and part is not annotation for model in models_in(part)]
    return list(dict.fromkeys(models))
