"""`BACKENDS`: the list of what can run a teacher's model, by the names that `teacher.backend` of a recipe gives them.

Another backend is a file beside this and a line here; from outside the package, `BACKENDS.register(Backend)`.
"""

from __future__ import annotations

from teachercache.errors import RecipeError
from teachercache.registry import Registry
from teachercache.teacher.backend import TeacherBackend
from teachercache.teacher.transformers_backend import TransformersBackend

BACKENDS: Registry[type[TeacherBackend]] = Registry(
    "teacher backend", (TransformersBackend,), name_of=lambda backend: backend.name
)


def backend_named(name: str) -> type[TeacherBackend]:
    """The backend of this name, also of an installed extension. Raises `RecipeError` for one that nobody has."""
    backend = BACKENDS.get(name)
    if backend is None:
        raise RecipeError(
            f"teacher.backend is {name!r}; there is {', '.join(BACKENDS)}; install the extension that has it, or leave it out"
        )
    return backend
