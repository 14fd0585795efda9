"""One architecture under examination: its folder, rows to try it on, and what transformers itself says of them.

Everything goes through the doors that users have: folders that load, `Teacher`, caches, `run_training`.

Shapes: S tokens, N positions, V vocabulary, D width, H heads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from teachercache.config import TargetsConfig, TeacherConfig
from teachercache.precompute.capture.layers import layer_kinds
from teachercache.targets import StoredTargets, TopK
from teachercache.teacher import Captured, Teacher
from teachercache.tokens.rows import Segment, TokenRow
from teachercache.training.job.train import run_training
from zoo.architectures import BLOCKS, VOCABULARY, Architecture
from zoo.training import cache_recipe, train_recipe

from builders import build_cache

LONGEST = 48  # tokens
EVERYTHING = TopK(VOCABULARY, (1.0,), "float32", VOCABULARY)  # the whole distribution, as it is
PER_BATCH = 512  # positions: all rows of a property in one batch


def row(*lengths: int, seed: int) -> TokenRow:
    """Random tokens: one document, or several packed into one row."""
    generator = np.random.default_rng(seed)
    starts = [int(start) for start in np.cumsum([0, *lengths[:-1]])]
    mask_S = np.ones(sum(lengths), dtype=bool)
    mask_S[np.cumsum(lengths) - 1] = False
    ids_S = generator.integers(2, VOCABULARY, sum(lengths)).astype(np.int32)
    segments = tuple(Segment(f"{seed:032x}", 0, 0, 1, start) for start in starts)
    return TokenRow(f"{seed:032x}", False, ids_S, mask_S, segments)


DOCUMENTS = [row(40, seed=0), row(23, seed=1), row(31, seed=2)]
PACKED = [row(13, 20, seed=3), row(30, 9, seed=4), row(5, 5, 17, seed=5)]
SAMPLE = [row(LONGEST, seed=100 + number) for number in range(12)]


class Subject:
    """An architecture's model, saved and loaded as users do."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        self.saved = architecture.save(folder / "teacher")
        self._caches: dict[str, Path] = {}

    @cached_property
    def eager(self) -> Any:
        """As transformers runs it step by step, without a fused kernel: nothing that the architecture has is left out."""
        return AutoModelForCausalLM.from_pretrained(self.saved, attn_implementation="eager").eval()

    def teacher(self, *, layout: str = "documents", implementation: str | None = None, **kinds: Any) -> Teacher:
        """The package's teacher; raises `ModelError` where it is refused."""
        config = TeacherConfig(model=str(self.saved), attention=implementation)
        logits = kinds.pop("logits", EVERYTHING)
        return Teacher.load(config, targets=StoredTargets(logits, **kinds), layout=layout, pad_id=0)

    def layers(self, **asked: Any) -> dict[str, Any]:
        """Kinds of layer targets, as a recipe's `targets` asks for them."""
        targets = TargetsConfig.model_validate(asked)
        return layer_kinds(targets, self.eager.config, longest=LONGEST)

    @cached_property
    def captured(self) -> list[Captured]:
        """`DOCUMENTS`, all in one batch."""
        return self.teacher().capture(DOCUMENTS, positions_per_batch=PER_BATCH)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the model's log-probabilities: the unit of what is off."""
        return float(np.concatenate([self.expected(each) for each in DOCUMENTS]).std())

    @cached_property
    def student(self) -> Path:
        """Other weights, the same architecture and tokenizer."""
        return self.architecture.save(self.folder / "student", seed=1)

    def cache(self, layout: str) -> Path:
        """A cache of this teacher in that layout, made once. Raises `ModelError` where it is refused."""
        if layout not in self._caches:
            recipe = cache_recipe(self.folder / layout, self.saved, layout=layout)
            self._caches[layout] = build_cache(recipe)
        return self._caches[layout]

    def recipe(self, name: str) -> Any:
        """The log of the training run with that name."""
        return train_recipe(self.cache("documents"), self.student, self.folder / name)

    def run(self) -> dict[str, Any]:
        """Its result, in one process; trained once. Raises `ModelError` where the student is refused."""
        return run_training(self.recipe("run"), console=Console(quiet=True))

    def expected(self, one: TokenRow) -> np.ndarray[Any, Any]:
        """Log-probabilities at a row's positions, [N, V], each document run alone by transformers."""
        return self.alone(one)[one.target_mask_S]

    def alone(self, one: TokenRow) -> np.ndarray[Any, Any]:
        """Log-probabilities at every token, [S, V]."""
        starts = [*(segment.start for segment in one.segments), one.length]
        with torch.no_grad():
            parts = [
                self.eager(torch.from_numpy(one.input_ids_S[start:end].astype(np.int64))[None], use_cache=False).logits[
                    0
                ]
                for start, end in pairwise(starts)
            ]
        return torch.cat(parts)[:, :VOCABULARY].float().log_softmax(-1).numpy()

    def around_first_block(self, one: TokenRow) -> tuple[Any, Any]:
        """Hidden states that enter and leave the first block, of a document alone, [S, D] each.

        By hooks: transformers' `output_hidden_states` begins behind the first block for some (Mamba, RWKV).
        """
        lists = [module for module in self.eager.modules() if isinstance(module, torch.nn.ModuleList)]
        [blocks] = [module for module in lists if len(module) == BLOCKS and type(module[0]) is not torch.nn.Linear]
        seen: dict[str, Any] = {}

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]
            seen["out"] = output[0] if isinstance(output, tuple) else output

        handle = blocks[0].register_forward_hook(hook, with_kwargs=True)
        self.alone(one)
        handle.remove()
        return tuple(seen[name][0].float().numpy() for name in ("in", "out"))

    def last_attention(self, one: TokenRow) -> torch.Tensor:
        """Maps of the last block, of a document alone, as transformers returns them, [H, S, S]."""
        ids_BS = torch.from_numpy(one.input_ids_S.astype(np.int64))[None]
        with torch.no_grad():
            return self.eager(ids_BS, use_cache=False, output_attentions=True).attentions[-1][0].float()

    def loss(self, one: TokenRow) -> float:
        """Cross-entropy as transformers itself shifts the labels."""
        ids_BS = torch.from_numpy(one.input_ids_S.astype(np.int64))[None]
        with torch.no_grad():
            return float(self.eager(ids_BS, labels=ids_BS, use_cache=False).loss)


def log_probabilities(captured: Captured) -> np.ndarray[Any, Any]:
    """[N, V] of what `EVERYTHING` stores."""
    assert captured.columns is not None, captured.problem
    ids_NV = torch.from_numpy(captured.columns["head_ids"].astype(np.int64))
    logits_NV = torch.from_numpy(captured.columns["head_logits"]).float()
    return torch.zeros_like(logits_NV).scatter_(1, ids_NV, logits_NV.log_softmax(-1)).numpy()


def with_last_token_changed(one: TokenRow) -> TokenRow:
    """The same row but for its last token, which no earlier position may feel."""
    ids_S = one.input_ids_S.copy()
    ids_S[-1] = 2 + (ids_S[-1] - 2 + 7) % (VOCABULARY - 2)
    return replace(one, input_ids_S=ids_S)
