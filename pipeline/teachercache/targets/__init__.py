"""Targets: what is stored of a teacher, as math. numpy only; torch enters as an argument.

    logits/     kinds of next-token targets, and what they share: softening, tails, the sketch's basis
    layers/     kinds of targets from a teacher's layers: hidden states and attention
    coding/     arrays to bytes: columns, codecs, named files, and the arithmetic under them
    stored.py   everything that one cache stores of its teacher

A target *kind* is one file of logits/ or layers/. It says which columns it stores (`columns`), how they are taken from what the
teacher computed (`capture` and `finish`; the only places that meet torch), how they become arrays of a batch (`decoded`), and,
for logits, how these are a distribution at any temperature (`softened`). logits/kinds.py lists those of logits; the
manifest's `targets` holds the settings that rebuild a kind. logits/kind.py and layers/kind.py write down what each
provides."""

from __future__ import annotations

from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.hidden_states import HiddenStates
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.boundary_mass import BoundaryMass
from teachercache.targets.logits.final_hidden import FinalHidden
from teachercache.targets.logits.full import Full
from teachercache.targets.logits.head_sketch import HeadSketch
from teachercache.targets.logits.kind import CalibratedKind, TargetKind, calibrates
from teachercache.targets.logits.kinds import KINDS, target_kind
from teachercache.targets.logits.random_sampling import RandomSampling
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policies import TAIL_POLICIES
from teachercache.targets.logits.tails.policy import TailContext, TailPolicy
from teachercache.targets.logits.temperature import grid_index
from teachercache.targets.logits.top_k import TopK
from teachercache.targets.logits.top_p import TopP
from teachercache.targets.stored import StoredTargets

__all__ = [
    "KINDS",
    "TAIL_POLICIES",
    "BoundaryMass",
    "CalibratedKind",
    "Column",
    "FinalHidden",
    "Full",
    "HeadSketch",
    "HiddenStates",
    "LayerFile",
    "RandomSampling",
    "SketchBasis",
    "Softened",
    "StoredTargets",
    "TailContext",
    "TailPolicy",
    "TargetKind",
    "TopK",
    "TopP",
    "calibrates",
    "grid_index",
    "target_kind",
]
