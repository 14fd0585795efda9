"""Checks that a checkpoint has every weight of the model that it is loaded into.

transformers draws the others at random and goes on: targets of such a teacher are noise, and other noise in each process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teachercache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMED = 3  # weights in a message
# `from_pretrained` returns (model, what it found), and leaves it to `whole` to refuse weights of another shape.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def whole(loaded: tuple[PreTrainedModel, Mapping[str, Any]], *, model: str) -> PreTrainedModel:
    """Returns the model of `from_pretrained(..., **REPORTED)`; raises `ModelError` where the checkpoint named `model`
    lacks weights of it, or has them in other shapes. Tied weights, and those that transformers knows to make itself,
    are not missed."""
    made, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{model} lacks {_listed(missing)} of {type(made).__name__}: they would be random; name a complete checkpoint "
            "of such a model"
        )
    mismatched = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in found["mismatched_keys"])
    if mismatched:
        shapes = [f"{name} in shape {stored} where {wanted} is needed" for name, stored, wanted in mismatched]
        raise ModelError(
            f"{model} has {_listed(shapes)} by {type(made).__name__}: config.json and weights are of different models; "
            "name a folder where they belong together"
        )
    return made


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more weights" if more > 0 else "")
