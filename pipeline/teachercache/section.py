"""Base of every section of a recipe, and keys that hold one of several: sections or names of a list (`Registry`).

Settings stand beside what they set, so this module is below all of that.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, Tag, ValidationError
from pydantic_core import CoreSchema, core_schema

from teachercache.registry import Registry, load_extensions


class Section(BaseModel):
    """Base of every recipe section: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Sections = Mapping[str, type[Section]]


def one_of(types: Mapping[str, type[Any]], *, tag_of: Callable[[Any], str], added: Callable[[], Sections]) -> Any:
    """The type of a key that holds a value of one of these types, sections or others, by tag. `tag_of` says which a value is
    meant to be; `added` gives sections from outside, as many as there are when it is called."""
    if len(types) == 1:
        return Annotated[next(iter(types.values())), OrAdded(tuple(types), tag_of, added)]
    named = [Annotated[part, Tag(tag)] for tag, part in types.items()]
    return Annotated[functools.reduce(operator.or_, named), Discriminator(tag_of), OrAdded(tuple(types), tag_of, added)]


@dataclass(frozen=True)
class OrAdded:
    """Lets a key hold sections that its type does not name, because they were added later."""

    own: tuple[str, ...]
    tag_of: Callable[[Any], str]
    added: Callable[[], Sections]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.simple_ser_schema("any")
        return core_schema.no_info_wrap_validator_function(
            self._validated, handler(source), serialization=serialization
        )

    def _validated(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        tag = self.tag_of(value)
        if tag in self.own:
            return handler(value)
        load_extensions()
        section = self.added().get(tag)
        return handler(value) if section is None else _tagged(tag, section, value)


def _tagged(tag: str, section: type[Section], value: Any) -> Section:
    """The section, validated; the tag is a step in the paths of errors, as in those of a union of pydantic's."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        lines: list[Any] = [{**line, "loc": (tag, *line["loc"])} for line in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(error.title, lines) from None


@dataclass(frozen=True)
class OrAddedName:
    """Lets a key hold, beside the names that its type lists, those of parts that were added to a registry later."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.simple_ser_schema("any")
        return core_schema.no_info_wrap_validator_function(
            self._validated, handler(source), serialization=serialization
        )

    def _validated(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            if isinstance(value, str) and value in self.registry:
                return value
            raise
