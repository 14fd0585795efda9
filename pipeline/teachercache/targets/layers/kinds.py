"""`LAYER_KINDS`: the kinds of layer targets that this version knows, by the names that manifests and recipes give them.

Another kind is a file beside this and a line here; from outside the package, `LAYER_KINDS.register(Kind)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teachercache.errors import CacheError
from teachercache.registry import Registry
from teachercache.section import one_of
from teachercache.targets.layers.attention_maps import AttentionMaps
from teachercache.targets.layers.attention_relations import Relations
from teachercache.targets.layers.attention_vectors import QueriesKeys
from teachercache.targets.layers.hidden_states import HiddenStates
from teachercache.targets.layers.kind import LayerKind
from teachercache.targets.layers.settings import LayerSettings

LAYER_KINDS: Registry[type[LayerKind]] = Registry(
    "kind of layer targets", (HiddenStates, Relations, QueriesKeys, AttentionMaps), name_of=lambda kind: kind.kind
)
SECTIONS = ("hidden", "attention")  # of `targets`; the first of a section's kinds above is its default


def kinds_of(section: str) -> tuple[str, ...]:
    """The kinds that this version reads in a section."""
    return tuple(name for name, kind in LAYER_KINDS.items() if kind.section == section)


def kind_named(section: str, settings: Mapping[str, Any]) -> type[LayerKind] | None:
    """The kind that a section of a manifest's `targets` names; None where nobody has it."""
    kind = LAYER_KINDS.get(str(settings.get("kind", section)))
    return kind if kind is not None and kind.section == section else None


def layer_kind(section: str, settings: Mapping[str, Any]) -> LayerKind:
    """The kind that a section describes; raises `CacheError` for one of a later version."""
    kind = kind_named(section, settings)
    if kind is None:
        raise CacheError(unknown_kind(section, str(settings.get("kind", section))))
    return kind.from_settings(settings)


def unknown_kind(section: str, name: str) -> str:
    """The line that says so."""
    return (
        f"the cache stores {section} of kind {name!r}, this version reads {', '.join(kinds_of(section))}; install a newer "
        "version of teachercache, or the extension that has it"
    )


def _settings_of(section: str) -> Any:
    """The type of a section in recipes."""

    def name_of(value: Any) -> str:
        return str(value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default))

    def added() -> dict[str, type[LayerSettings]]:
        return {kind.kind: kind.config for kind in LAYER_KINDS.added if kind.section == section}

    configs = {kind.kind: kind.config for kind in LAYER_KINDS.own if kind.section == section}
    default = next(iter(configs))
    return one_of(configs, tag_of=name_of, added=added)


if TYPE_CHECKING:
    HiddenTargets = LayerSettings
    AttentionTargets = LayerSettings
else:
    HiddenTargets, AttentionTargets = _settings_of("hidden"), _settings_of("attention")
