"""The tail policies, by the names that `objective.tail` gives them. Another policy is a file beside this and a line here; from
outside the package, `TAIL_POLICIES.register(policy)`."""

from __future__ import annotations

from teachercache.registry import Registry
from teachercache.targets.logits.tails.ghost import Ghost
from teachercache.targets.logits.tails.policy import TailPolicy
from teachercache.targets.logits.tails.renormalise import Renormalise
from teachercache.targets.logits.tails.sketch import Sketch
from teachercache.targets.logits.tails.uniform import Uniform

TAIL_POLICIES: Registry[TailPolicy] = Registry(
    "tail policy", (Ghost(), Uniform(), Renormalise(), Sketch()), name_of=lambda policy: policy.name
)
