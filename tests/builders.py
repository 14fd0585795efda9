"""Small real parts for tests: a seeded model, a trained byte-level tokenizer, and caches made by the real stages.

Everything is what users have, only tiny: `transformers` models of a few thousand weights, saved and loaded as folders.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from teachercache.config import Recipe, parse_recipe

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "quick",
    "foxes",
    "ran",
    "over",
    "lazy",
    "dogs",
    "and",
    "then",
    "jumped",
    "into",
    "cold",
    "water",
    "near",
    "old",
    "trees",
]


def sentences(count: int, *, seed: int = 0, words: int = 30) -> list[str]:
    """Distinct seeded texts of about `words` words each, lengths varying."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(max(2, words // 3), words))) + f" {number}."
        for number in range(count)
    ]


def byte_level_bpe(texts: list[str], *, vocabulary: int, special: list[str]) -> Any:
    """A `tokenizers.Tokenizer` trained on texts; special tokens have the first ids."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    return Tokenizer.from_str(trained.to_str())


def tiny_tokenizer(*, vocabulary: int = 300, chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer with an end-of-sequence token, trained on `sentences`."""
    from transformers import PreTrainedTokenizerFast

    trained = byte_level_bpe(sentences(200), vocabulary=vocabulary, special=["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def beginning_with(tokenizer: Any, *tokens: str) -> Any:
    """The tokenizer, which from now on puts these special tokens before every text; the first one is its BOS."""
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": tokens[0], "additional_special_tokens": list(tokens[1:])})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*tokens, "$A"]), special_tokens=marks
    )
    return tokenizer


def tiny_model(
    *, vocabulary: int = 300, layers: int = 2, hidden: int = 32, seed: int = 0, context: int = 256, tied: bool = True
) -> Any:
    """A seeded Llama; its weights are scaled up so that its distributions are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.mul_(6)
    return model


def tiny_teacher(
    folder: Path, *, tokenizer: Any = None, chat_template: str | None = None, padded_vocabulary: int = 0, **model: Any
) -> Path:
    """A folder with a tiny model and its tokenizer; `padded_vocabulary` adds rows that no token uses."""
    tokenizer = tokenizer or tiny_tokenizer(chat_template=chat_template)
    made = tiny_model(vocabulary=len(tokenizer) + padded_vocabulary, **model)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def other_tokenizer(*, vocabulary: int = 340, seed: int = 9, chat_template: str | None = None) -> Any:
    """A byte-level tokenizer with other tokens than the teacher's, at other ids."""
    from transformers import PreTrainedTokenizerFast

    trained = byte_level_bpe(sentences(50, seed=seed), vocabulary=vocabulary, special=["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def other_student(folder: Path, *, tokenizer: Any = None, layers: int = 1, dropout: float = 0.1) -> Path:
    """A folder with a model and a tokenizer that is another one than the teacher's."""
    tokenizer = tokenizer or other_tokenizer()
    model = tiny_model(vocabulary=len(tokenizer), layers=layers, seed=2)
    model.config.attention_dropout = dropout
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def aligned(cache: Path, student: Path) -> Path:
    """Align a cache with a student's tokenizer by the real stages, without Ray; returns the alignment's folder."""
    from teachercache.cache import Cache
    from teachercache.precompute.align.job import commit
    from teachercache.precompute.align.plan import make_plan
    from teachercache.precompute.align.units import align_shard

    opened = Cache.open(cache)
    plan = make_plan(opened, str(student))
    for unit in plan.pending():
        align_shard(plan, unit)
    commit(plan, opened)
    return cache / plan.within


def tiny_student(folder: Path, *, layers: int = 1, dropout: float = 0.1) -> Path:
    """A folder with other weights than the teacher's, no tokenizer, and dropout, so that random states matter."""
    model = tiny_model(layers=layers, seed=1)
    model.config.attention_dropout = dropout
    model.save_pretrained(folder)
    return folder


def scaled_student(folder: Path) -> Path:
    """A folder with a student that scales its logits: its loss is formed outside of its output layer."""
    import torch
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = CohereConfig(**sizes, **heads, max_position_embeddings=256, pad_token_id=0, logit_scale=0.25)
    CohereForCausalLM(config).save_pretrained(folder)
    return folder


def write_corpus(path: Path, texts: list[str]) -> Path:
    """A JSONL file with one text a line."""
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_recipe(
    folder: Path, *, teacher: Path | None = None, texts: list[str] | None = None, **sections: dict[str, Any]
) -> Recipe:
    """A recipe over a tiny teacher and a JSONL corpus in `folder`; `sections` are merged into the recipe's."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher or tiny_teacher(folder / "teacher")
    corpus = write_corpus(folder / "corpus.jsonl", texts if texts is not None else sentences(40))
    data: dict[str, Any] = {
        "cache": str(folder / "cache"),
        "teacher": {"model": str(teacher)},
        "corpus": {"source": str(corpus), "held_out": 0.2},
        "sequence": {"length": 48},
        "targets": {"logits": {"kind": "top-k", "k": 16}},
        "precompute": {"unit_rows": 16, "positions_per_batch": 256, "threads_per_actor": 1},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_recipe(data, origin="tests")


def build_cache(recipe: Recipe, *, units: int | None = None) -> Path:
    """Precompute in this process: the stages that Ray runs, one unit after the other; all of them and the commit, or the
    first `units`."""
    import torch

    from teachercache.precompute.capture.commit import commit
    from teachercache.precompute.capture.given_calibration import take_calibration
    from teachercache.precompute.capture.plan import make_plan
    from teachercache.precompute.capture.unit_tokens import tokenise_unit
    from teachercache.precompute.capture.units import actor_threads, calibrate, compute_unit
    from teachercache.teacher import Teacher

    torch.set_num_threads(actor_threads(recipe.precompute))  # part of what decides the last bit
    plan = make_plan(recipe)
    assert recipe.teacher is not None and recipe.corpus is not None
    if recipe.targets.calibration_from is not None:
        take_calibration(plan, recipe.targets.calibration_from)
    pad_id = plan.identity["tokenizer"]["pad_id"]
    teacher = Teacher.load(
        recipe.teacher,
        targets=plan.loaded_targets(),
        layout=recipe.sequence.layout,
        pad_id=pad_id,
        longest=recipe.sequence.length,
    )
    if plan.calibration() is None:
        calibrate(teacher, plan, sequence=recipe.sequence, positions_per_batch=recipe.precompute.positions_per_batch)
    for unit in plan.pending()[:units]:
        tokenised, documents = tokenise_unit(plan, unit, sequence=recipe.sequence, store_text=recipe.corpus.store_text)
        size = recipe.precompute.positions_per_batch
        compute_unit(teacher, plan, unit, tokenised, documents=documents, positions_per_batch=size)
    if units is None:
        commit(plan)
    return recipe.cache


def part(cache: Path, number: int, *, group: str = "shards") -> Path:
    """The file of a shard in a cache's folder, by its number and column group."""
    [found] = (cache / group).glob(f"part-{number:05d}-*.arrow")
    return found


def tiny_cache(folder: Path, *, teacher: Path | None = None, texts: list[str] | None = None, **sections: Any) -> Path:
    """A finished cache at `folder/cache`; see `tiny_recipe` for the arguments."""
    return build_cache(tiny_recipe(folder, teacher=teacher, texts=texts, **sections))


if __name__ == "__main__":
    import sys

    print(tiny_cache(Path(sys.argv[1])))
