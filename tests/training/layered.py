"""Parts that the tests of layers share: targets of their cache, and one term of every kind."""

from __future__ import annotations

from typing import Any

LAYERED_TARGETS: dict[str, Any] = {
    "logits": {"kind": "top-k", "k": 16, "dtype": "float32"},
    "hidden": {"layers": [2, 4], "step": 0.02},
    "attention": {"layers": [4], "values": True},
}
TERMS = [
    {"match": "hidden-cosine", "weight": 0.5},
    {"match": "hidden-mse", "pairs": {2: 4}, "weight": 0.1},
    {"match": "attention-kl", "heads": "mix"},
    {"match": "attention-mse"},
    {"match": "value-relations"},
    {"match": "query-relations", "relation_heads": 2},
    {"match": "distances"},
    {"match": "angles"},
    {"match": "sample-distances"},
    {"match": "channel-correlation", "weight": 10.0},
]
