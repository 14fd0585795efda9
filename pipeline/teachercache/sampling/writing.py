"""A student goes on from prompts; samples as JSON lines.

Shapes: B prompts, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from teachercache.files import write_whole
from teachercache.sampling.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    field: str,
    new_tokens: int,
    temperature: float,
    batch: int,
    seed: int,
    console: Console,
) -> int:
    """The file appears whole. Returns how many tokens the student wrote. On the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    lines, written = [], 0
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sample", total=len(prompts))
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            torch.manual_seed(_seed(seed, start))
            for prompt, ids in zip(part, _go_on(model, tokenizer, part, new_tokens, temperature), strict=True):
                written += len(ids)
                lines.append(json.dumps({field: _sample(tokenizer, prompt, ids)}, ensure_ascii=False))
            progress.advance(task, len(part))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, "".join(line + "\n" for line in lines))
    return written


def _seed(seed: int, start: int) -> int:
    return (seed * 1_000_003 + start) % 2**63


def _go_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Continues each prompt; returns the new tokens without what ends them. Every token of the vocabulary can come, as
    the student has it."""
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids_BS = torch.tensor([[padding] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts])
    mask_BS = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    with torch.no_grad():
        found_BS = model.generate(
            input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), do_sample=True,
            temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new_tokens,
            pad_token_id=padding, eos_token_id=sorted(ends) or None,
        )  # fmt: skip
    return [_until(row[longest:], ends) for row in found_BS.tolist()]


def _until(ids: list[int], ends: set[Any]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _sample(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int]) -> Any:
    """A text, or a conversation with the student's answer."""
    if prompt.messages is not None:
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        return [*prompt.messages, {"role": "assistant", "content": answer}]
    return tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
