"""Beginnings of rows: every window, in every layout, has what the tokenizer puts before a text, and never as a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from teachercache.config import CorpusConfig, SequenceConfig
from teachercache.corpus.documents import documents
from teachercache.corpus.sequences import Tokenised, tokenise
from teachercache.errors import ModelError, RecipeError
from teachercache.tokens.prefix import own_prefix, row_prefix, template_prefix
from teachercache.tokens.rows import TokenRow

from chat_templates import GLM, GLM_TOKENS, TEMPLATES
from tokenizer_families import REAL, wordpiece

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
LAYOUTS = ("documents", "packed")
TEXTS = st.lists(st.text(min_size=1, max_size=50).filter(str.strip), min_size=1, max_size=5, unique=True)
KINDS = ("plain", "bos", "two", "wordpiece")
_KNOWN: dict[str, Any] = {}


@pytest.fixture(scope="module")
def of_kind(build_tokenizer: Any) -> Any:
    """Tokenizers that put nothing, BOS, two tokens, or CLS (and SEP behind) about a text."""

    def two() -> Any:
        from tokenizers import processors

        tokenizer = build_tokenizer()
        marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_start|>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> <|im_start|> $A", special_tokens=marks
        )
        return tokenizer

    makers = {"plain": build_tokenizer, "bos": lambda: build_tokenizer(bos=True), "two": two, "wordpiece": wordpiece}

    def made(kind: str) -> Any:
        if kind not in _KNOWN:
            _KNOWN[kind] = makers[kind]()
        return _KNOWN[kind]

    return made


def rows_of(texts: list[str], tokenizer: Any, **sequence: Any) -> Tokenised:
    items = list(documents([{"text": text} for text in texts], CorpusConfig(source="-")))
    return tokenise(items, tokenizer=tokenizer, sequence=SequenceConfig(**sequence), store_text=True)


def segments_of(rows: list[TokenRow]) -> dict[str, list[tuple[Any, list[int], list[bool]]]]:
    """Segments of each document in the order of the text: the segment, its ids and its target mask."""
    found: dict[str, list[tuple[Any, list[int], list[bool]]]] = {}
    for row in rows:
        ends = [*(segment.start for segment in row.segments[1:]), row.length]
        for segment, end in zip(row.segments, ends, strict=True):
            part = slice(segment.start, end)
            entry = segment, row.input_ids_S[part].tolist(), row.target_mask_S[part].tolist()
            found.setdefault(segment.source_id, []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: (entry[0].byte_end, entry[0].byte_start))
    return found


def body_of(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a document without what stands before it, from the tokenizer alone."""
    ids = tokenizer(text, verbose=False)["input_ids"][len(own_prefix(tokenizer)) :]
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(
    texts=TEXTS,
    choice=st.sampled_from(["auto", "bos", "eos", "none"]),
    room=st.integers(0, 30),
    context=st.integers(0, 20),
)
def test_every_token_after_the_prefix_is_predicted_once(of_kind, layout, kind, texts, choice, room, context):
    """In order; its own text stands before it, as far as `context` reaches; without a prefix but for the first token."""
    tokenizer = of_kind(kind)
    if choice in ("bos", "eos") and getattr(tokenizer, f"{choice}_token_id") is None:
        return
    prefix = list(row_prefix(tokenizer, choice, chats=False))
    length = len(prefix) + context + 2 + room
    result = rows_of(texts, tokenizer, layout=layout, length=length, prefix=choice, context=context)
    assert all(row.length <= length for row in result.rows)
    found = segments_of(result.rows)
    sources = [document.source_id for document in documents([{"text": t} for t in texts], CorpusConfig(source="-"))]
    for source, text in zip(sources, texts, strict=True):
        body = body_of(text, tokenizer)
        if source not in found:
            assert len(prefix) + len(body) < 2
            continue
        first = 0 if prefix else 1
        windows = _in_order(found[source], len(prefix), body, context)
        assert [token for labels in windows for token in labels] == body[first:]


def _in_order(entries: list[Any], prefix: int, body: list[int], context: int) -> list[list[int]]:
    """The labels of each window, once it is checked that each begins with the prefix and then with what came before."""
    beginnings = {tuple(ids[:prefix]) for _, ids, _ in entries}
    assert len(beginnings) == 1
    pending = [(ids[prefix:], mask) for _, ids, mask in entries]
    windows, done = [], 0
    while pending:
        again = min(context + 1, done)
        # windows inside one character share a span: the one whose text goes on where the last one stopped
        number = next(
            n for n, (ids, mask) in enumerate(pending)
            if ids == body[done - again : done - again + len(ids)]
            and sum(mask) == len(ids) - again - (0 if prefix or done else 1)
        )  # fmt: skip
        ids, mask = pending.pop(number)
        labelled = np.flatnonzero(mask) + 1
        labels = [ids[index - prefix] for index in labelled.tolist()]
        assert (
            not mask[-1]
            and labelled.min() >= max(prefix, 1)
            and labelled.min() == prefix + again + (not prefix and not done)
        )
        windows.append(labels)
        done += len(ids) - again
    assert done == len(body)
    return windows


@pytest.mark.parametrize("layout", LAYOUTS)
@relaxed
@given(texts=TEXTS, length=st.integers(2, 40))
def test_a_tokenizer_that_puts_nothing_in_front_changes_nothing(of_kind, layout, texts, length):
    tokenizer = of_kind("plain")
    auto, none = (rows_of(texts, tokenizer, layout=layout, length=length, prefix=choice) for choice in ("auto", "none"))
    assert [(row.row_id, row.input_ids_S.tolist(), row.target_mask_S.tolist()) for row in auto.rows] == [
        (row.row_id, row.input_ids_S.tolist(), row.target_mask_S.tolist()) for row in none.rows
    ]


def test_names_of_rows_follow_their_spans_alone(of_kind):
    """A document that fits a row has the same name whatever it begins with."""
    named = [rows_of(["The dog."], of_kind(kind), prefix=choice).rows[0].row_id
             for kind in ("plain", "bos") for choice in ("auto", "bos", "none")]  # fmt: skip
    assert len(set(named)) == 1


def test_what_a_length_must_hold(of_kind):
    with pytest.raises(RecipeError, match=r"length is 2, .* 1 tokens of sequence.prefix and 1 .*set it to 3 or more"):
        rows_of(["The dog and the fox."], of_kind("bos"), length=2)
    with pytest.raises(ValidationError, match="context is 7, which leaves no token to predict in windows of length 8"):
        SequenceConfig(length=8, context=7)
    with pytest.raises(RecipeError, match=r"prefix is bos, and the tokenizer has no beginning-of-sequence token"):
        rows_of(["The dog."], of_kind("wordpiece"), prefix="bos")


# --- conversations ---

QUESTION = {"role": "user", "content": "What is the capital of France, and of the dog? " * 3}
ANSWER = {"role": "assistant", "content": "The capital is Paris, and the dog does not mind. " * 3}


def chat_rows(tokenizer: Any, *, turns: int = 1, **sequence: Any) -> Tokenised:
    config = CorpusConfig(source="-", messages_field="messages")
    items = list(documents([{"messages": [QUESTION, ANSWER] * turns}], config))
    return tokenise(items, tokenizer=tokenizer, sequence=SequenceConfig(**sequence), store_text=True)


@pytest.mark.parametrize(
    ("template", "begins"), [("no-prompt", True), ("thinking-prompt", True), ("chatml", False), ("generation", False)]
)
@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_a_conversation_begin_as_its_template_does(build_tokenizer, template, begins, bos):
    """Whatever the tokenizer would put before a text: a template writes what there is to be."""
    tokenizer = build_tokenizer(template, bos=bos)
    result = chat_rows(tokenizer, length=24)
    assert len(result.rows) > 2
    for row in result.rows:
        assert (row.input_ids_S[0] == tokenizer.bos_token_id) == begins
        assert (row.input_ids_S == tokenizer.bos_token_id).sum() == begins
        assert tokenizer.bos_token_id not in row.labels_N()
    told = tokenizer.decode([label for row in result.rows for label in row.labels_N()])
    assert told.replace("<|im_end|>", "").replace("<|endoftext|>", "").split() == ANSWER["content"].split()


def test_a_mark_of_every_turn_is_no_beginning(build_tokenizer):
    """SmolLM2 calls ChatML's <|im_start|> its BOS."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.bos_token = "<|im_start|>"
    assert template_prefix(tokenizer) == ()
    assert row_prefix(build_tokenizer("no-prompt"), chats=True) == (tokenizer.convert_tokens_to_ids("<s>"),)


def test_a_beginning_that_ends_answers_too_is_one(build_tokenizer):
    """OLMo 2 begins a conversation with the token that ends its answers."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert template_prefix(tokenizer) == (tokenizer.eos_token_id,)
    rows = chat_rows(tokenizer, length=24).rows
    assert len(rows) > 2 and {row.input_ids_S[0] for row in rows} == {tokenizer.eos_token_id}


MARKED = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OWN_SYSTEM = "<|system|>\nReasoning effort: max"


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (GLM, ["[gMASK]", "<sop>"]),
        (GLM.replace("<sop>", "<sop>" + OWN_SYSTEM), ["[gMASK]", "<sop>"]),  # as GLM 5.3's
        (MARKED, []),
        (OWN_SYSTEM + MARKED, []),  # the mark of the system's turn is none
        ("{{ bos_token }}" + OWN_SYSTEM + MARKED, ["<s>"]),
        (LLAMA_2, ["<s>"]),
        ("{{ bos_token + '<sop>' }}" + TEMPLATES["chatml"], ["<s>", "<sop>"]),
    ],
    ids=["GLM", "GLM-system", "marked", "marked-system", "bos-system", "llama-2", "bos-sop-chatml"],
)
def test_all_special_tokens_that_a_conversation_begins_with_and_no_turn(build_tokenizer, template, begins):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": GLM_TOKENS})
    tokenizer.chat_template = template
    if template.startswith("[gMASK]"):
        tokenizer.bos_token = None
    expected = tokenizer.convert_tokens_to_ids(begins)
    assert list(template_prefix(tokenizer)) == expected
    rows = chat_rows(tokenizer, length=26).rows
    assert len(rows) > 2
    for row in rows:
        assert row.input_ids_S[: len(expected)].tolist() == expected
        assert not set(expected) & {*row.labels_N().tolist(), *row.input_ids_S[len(expected) :].tolist()}
    learned = [label for row in rows for label in row.labels_N().tolist()]
    assert tokenizer.decode(learned, skip_special_tokens=True).split() == ANSWER["content"].split()


def test_a_beginning_that_the_template_does_not_write_is_put_before_every_window(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    plain, begun = (chat_rows(tokenizer, length=64, prefix=choice).rows for choice in ("auto", "bos"))
    assert {row.input_ids_S[0] for row in begun} == {tokenizer.bos_token_id}
    assert [t for row in begun for t in row.labels_N()] == [t for row in plain for t in row.labels_N()]


@pytest.mark.parametrize(("name", "expected"), [("smollm2", ()), ("minilm", (101,)), ("qwen", ()), ("deepseek", ())])
def test_what_real_tokenizers_put_before_a_text(name, expected):
    assert own_prefix(REAL[name]()) == expected


def of_genes(*, single: str, letters: str = "GCT") -> Any:
    """A vocabulary without the letter `a`, nor a token for what it does not know."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("single", "prefix"), [("<s> $A", (0,)), ("$A </s>", ()), ("</s> <s> $A </s>", (1, 0))])
def test_a_prefix_is_found_where_usual_letters_have_no_token(single: str, prefix: tuple[int, ...]) -> None:
    tokenizer = of_genes(single=single)
    assert own_prefix(tokenizer) == prefix
    result = rows_of(["GCT" * 20], tokenizer, length=8)
    assert len(result.rows) > 5
    assert all(tuple(row.input_ids_S[: len(prefix)].tolist()) == prefix for row in result.rows)


def test_a_tokenizer_that_has_no_token_for_any_text_is_refused() -> None:
    with pytest.raises(ModelError, match="no token for any text"):
        own_prefix(of_genes(single="<s> $A", letters=""))
