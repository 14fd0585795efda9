"""`Registry`: the one list of the parts of a sort, by name, which code outside the package may add to.

A part from outside joins its list by `register`, when its module is imported. Commands and worker processes find it where an
installed package names that module under the entry point group `teachercache.extensions`: these modules are imported, once
in a process, when a name is asked for that is on no list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from teachercache.errors import UserError

GROUP = "teachercache.extensions"

Part = TypeVar("Part")


class Registry(Mapping[str, Part]):
    """Parts by name, the package's own first; iterates over names. `what` is what messages call one."""

    def __init__(self, what: str, parts: Iterable[Part], *, name_of: Callable[[Part], str]) -> None:
        self._what, self._name_of = what, name_of
        self._parts = {name_of(part): part for part in parts}
        self._own = frozenset(self._parts)

    def register(self, part: Part) -> Part:
        """Add a part from outside, and return it, so that this serves as a decorator. One that was added before and has the
        same name is replaced: a notebook's cell may run again. Raises `ValueError` for a name of the package's own."""
        name = self._name_of(part)
        if name in self._own:
            raise ValueError(f"there is a {self._what} {name!r} in teachercache; give yours another name")
        self._parts[name] = part
        return part

    def remove(self, name: str) -> None:
        """Take back a part from outside, if it is there. Raises `ValueError` for one of the package's own."""
        if name in self._own:
            raise ValueError(f"the {self._what} {name!r} is teachercache's own")
        self._parts.pop(name, None)

    @property
    def own(self) -> tuple[Part, ...]:
        """The parts of the package itself."""
        return tuple(part for name, part in self._parts.items() if name in self._own)

    @property
    def added(self) -> tuple[Part, ...]:
        """The parts from outside that have been registered so far."""
        return tuple(part for name, part in self._parts.items() if name not in self._own)

    def __getitem__(self, name: str) -> Part:
        """Raises `KeyError`, and what `load_extensions` does."""
        if name not in self._parts:
            load_extensions()
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@functools.cache
def load_extensions() -> None:
    """Import the modules of installed packages that add parts. Raises `UserError`, naming the one that fails."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the extension {point.name} ({point.value}) cannot be imported: {message}; mend or uninstall it"
            ) from error
