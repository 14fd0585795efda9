"""Let a student go on from prompts, and write what comes out as a corpus."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from teachercache.config import Recipe
from teachercache.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["run_sampling"]


def run_sampling(
    recipe: Recipe,
    *,
    out: Path,
    student: str | None = None,
    rows: int = 1024,
    prompt_tokens: int = 32,
    new_tokens: int = 224,
    temperature: float = 1.0,
    batch: int = 16,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Let a student (by default the recipe's trained one) go on from the beginnings of documents of the recipe's corpus, and
    write what comes out as a corpus of the same form: JSON lines with the field that the corpus has, texts or conversations.

    Documents are chosen by a hash of `seed` and their content, never held-out ones: each seed draws others. Returns `corpus`
    (the file), `rows`, `tokens` (written by the student), `seconds`. The same arguments on the same device write the same file.

    Raises `RecipeError` where the file exists, or a number makes no sense; `CorpusError` and `ModelError` for what cannot be
    read.
    """
    from teachercache.models.loading import load_causal_lm, load_tokenizer
    from teachercache.sampling.prompts import prompts
    from teachercache.sampling.writing import write_samples

    recipe.require("corpus")
    assert recipe.corpus is not None
    student = _trained_student(recipe) if student is None else student
    _check_arguments(out, temperature)
    shown, began = console or Console(stderr=True), time.perf_counter()
    tokenizer, model = load_tokenizer(student), load_causal_lm(student, dtype="auto")
    _check_length(model.config, student, prompt_tokens + new_tokens)
    chosen = prompts(
        recipe.corpus, tokenizer, rows=rows, prompt_tokens=prompt_tokens, seed=seed, prefix=recipe.sequence.prefix
    )
    shown.print(
        f"{student} goes on from {len(chosen):,} beginnings of {recipe.corpus.source} …", markup=False, soft_wrap=True
    )
    tokens = write_samples(
        model, tokenizer, chosen, out, field=recipe.corpus.messages_field or recipe.corpus.text_field,
        new_tokens=new_tokens, temperature=temperature, batch=batch, seed=seed, console=shown,
    )  # fmt: skip
    shown.print(
        f"wrote {len(chosen):,} samples, {tokens:,} tokens of the student's → {out}", markup=False, soft_wrap=True
    )
    seconds = round(time.perf_counter() - began, 3)
    return {"corpus": str(out), "rows": len(chosen), "tokens": tokens, "seconds": seconds}


def _trained_student(recipe: Recipe) -> str:
    recipe.require("train")
    return str(recipe.train.output / "student") if recipe.train else ""


def _check_arguments(out: Path, temperature: float) -> None:
    if out.exists():
        raise RecipeError(f"{out} exists; give another --out, or delete it")
    if not temperature > 0:
        raise RecipeError(f"--temperature {temperature:g} is not positive; use 1 to sample what the student would say")


def _check_length(config: PretrainedConfig, student: str, tokens: int) -> None:
    from teachercache.models.rotary import most_positions

    longest = most_positions(config)
    if longest is not None and tokens > longest:
        raise RecipeError(
            f"--prompt-tokens and --new-tokens add up to {tokens}, and {student} takes at most {longest} tokens; lower one of "
            "them"
        )
