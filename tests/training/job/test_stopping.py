"""Exported students stop where their rows ended: base models of an instruct teacher, as the families set them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig, StudentConfig
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.training.job.export import export_student
from teachercache.training.job.stopping import Ends
from teachercache.training.job.train import run_training
from teachercache.training.supervision.choice import supervision_of
from teachercache.training.supervision.tokenizers import alignments_of

from builders import aligned, byte_level_bpe, other_student, other_tokenizer, sentences, tiny_cache

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QUESTIONS = ["who sat?", "what ran?", "where is it?", "why so cold?", "which trees?", "how many foxes?"]
CHATS = [[{"role": "user", "content": each}, {"role": "assistant", "content": "the cat"}] for each in QUESTIONS * 4]


@dataclass(frozen=True)
class Family:
    """Special tokens of a family, in the order of their ids, and what base and instruct make of them."""

    model: str
    special: tuple[str, ...]
    base: dict[str, str]
    instruct: dict[str, str]
    template: str
    ends: tuple[str, ...]  # of the exported student
    begins: bool = False  # every text with its bos


FAMILIES = {
    "Llama 3": Family(
        "Llama",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA, ("<|end_of_text|>", "<|eot_id|>"), begins=True,
    ),
    "Qwen 2.5": Family(
        "Qwen2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        CHATML, ("<|endoftext|>", "<|im_end|>"),
    ),
    "Gemma 3": Family(
        "Gemma3",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        GEMMA, ("<eos>", "<end_of_turn>"), begins=True,
    ),
    "SmolLM2": Family(
        "Llama",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        CHATML, ("<|endoftext|>", "<|im_end|>"),
    ),
}  # fmt: skip


def tokenizer_of(family: Family, *, instruct: bool) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    trained = byte_level_bpe([*sentences(60), *QUESTIONS], vocabulary=300, special=[*family.special])
    roles = family.instruct if instruct else family.base
    if family.begins:
        trained.post_processor = processors.TemplateProcessing(
            single=f"{roles['bos_token']} $A",
            special_tokens=[(roles["bos_token"], family.special.index(roles["bos_token"]))],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, additional_special_tokens=[*family.special], **roles)
    tokenizer.chat_template = family.template if instruct else None
    return tokenizer


def saved(folder: Path, family: Family, *, instruct: bool, seed: int) -> Path:
    """A tiny model of the family with its tokenizer."""
    import transformers

    tokenizer = tokenizer_of(family, instruct=instruct)
    torch.manual_seed(seed)
    roles = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family.model}{'Text' if family.model == 'Gemma3' else ''}Config")(
        vocab_size=len(tokenizer), **SIZES, **HEADS, **roles
    )
    model = getattr(transformers, f"{family.model}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_cache(folder: Path, teacher: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"messages": each, "n": n}) + "\n" for n, each in enumerate(CHATS)))
    section = {"source": str(corpus), "messages_field": "messages", "deduplicate": False}
    return tiny_cache(folder, teacher=teacher, corpus=section, targets={"logits": {"kind": "top-k", "k": 4}})


def taught(student: Path, row: Any, folder: Path) -> Path:
    """A checkpoint of the student after it has learned a row by heart."""
    model = load_causal_lm(str(student)).train()
    ids, learned = torch.from_numpy(row.input_ids_S.astype("int64"))[None], torch.from_numpy(row.target_mask_S)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        logits = model(ids).logits[0][learned]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:][learned[:-1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_student_of_an_instruct_teacher_stops_where_its_rows_end(tmp_path: Path, name: str) -> None:
    from transformers import pipeline

    family = FAMILIES[name]
    teacher = saved(tmp_path / "teacher", family, instruct=True, seed=0)
    base = saved(tmp_path / "base", family, instruct=False, seed=1)
    cache = Cache.open(chat_cache(tmp_path / "cache", teacher))
    settings = StudentConfig(model=str(base))
    assert alignments_of(settings, [cache]) == []
    checkpoint = taught(base, cache.read_row("train", 0).row, tmp_path / "checkpoint")
    supervision = supervision_of([cache], ObjectiveConfig())
    with supervision.exported_tokenizer(settings) as folder:
        ends = Ends.of(supervision, tokenizer_folder=folder)
        export_student(checkpoint, config=settings, tokenizer=folder, ends=ends, student=tmp_path / "student")

    exported, tokenizer = load_causal_lm(str(tmp_path / "student")), load_tokenizer(str(tmp_path / "student"))
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in family.ends]
    assert exported.generation_config.eos_token_id == exported.config.eos_token_id == wanted
    assert tokenizer.eos_token == family.instruct["eos_token"] and tokenizer.chat_template == family.template
    assert exported.generation_config.bos_token_id == (
        tokenizer.bos_token_id if "bos_token" in family.instruct else None
    )
    assert exported.generation_config.pad_token_id is not None

    prompt = [CHATS[0][0]]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    written = exported.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written[-1] == wanted[-1] and tokenizer.decode(written, skip_special_tokens=True) == "the cat"
    speak = pipeline("text-generation", model=str(tmp_path / "student"), device="cpu")
    assert speak(prompt, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"] == "the cat"


def test_a_student_of_another_tokenizer_stops_where_its_own_template_ends_a_turn(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", FAMILIES["Gemma 3"], instruct=True, seed=0)
    cache = chat_cache(tmp_path / "cache", teacher)
    tokenizer = other_tokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    student = other_student(tmp_path / "student", tokenizer=tokenizer)
    aligned(cache, student)
    alignments = alignments_of(StudentConfig(model=str(student)), [Cache.open(cache)])
    supervision = supervision_of([Cache.open(cache)], ObjectiveConfig(), alignments=alignments)
    with supervision.exported_tokenizer(StudentConfig(model=str(student))) as folder:
        ends = Ends.of(supervision, tokenizer_folder=folder)
        assert load_tokenizer(str(folder)).chat_template == CHATML
    assert ends.rows == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize("inside", [False, True])
def test_answers_whose_end_is_not_learned_are_told_of(
    tmp_path: Path, make_recipe: Callable[..., Any], inside: bool
) -> None:
    """The template says what the assistant wrote, and leaves out the mark that ends it."""
    end = "{% endgeneration %}"
    answer = "{% generation %}{{ m.content }}" + (f"<|im_end|>{end}" if inside else f"{end}<|im_end|>")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    family = replace(FAMILIES["Qwen 2.5"], template=template)
    teacher = saved(tmp_path / "teacher", family, instruct=True, seed=0)
    base = saved(tmp_path / "base", family, instruct=False, seed=1)
    cache = chat_cache(tmp_path / "cache", teacher)
    said = io.StringIO()
    recipe = make_recipe(cache_folder=cache, student_model=base, objective={"temperature": 1.0}, max_steps=1)
    run_training(recipe, console=Console(file=said, width=1000))
    lines = [line for line in said.getvalue().splitlines() if "know where to stop" in line]
    assert len(lines) == (0 if inside else 1)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_student_without_tokenizer_files_takes_the_teachers_end_and_no_token_that_ends_nothing(
    make_recipe: Callable[..., Any], student: Path, lora: dict[str, Any] | None
) -> None:
    """Its config has LlamaConfig's own end, 2, which is a letter here."""
    assert load_causal_lm(str(student)).config.eos_token_id == 2
    result = run_training(make_recipe(max_steps=1, lora=lora))
    exported, tokenizer = load_causal_lm(result["student"]), load_tokenizer(result["student"])
    assert exported.config.eos_token_id == exported.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert exported.generation_config.pad_token_id == 0 and exported.config.pad_token_id is None
