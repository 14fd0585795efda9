"""Places of a conversation's messages in its text, whatever the template does to them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teachercache.config import SequenceConfig
from teachercache.corpus.chat import ChatRenderer, Unrenderable, said
from teachercache.corpus.contents import contents_of
from teachercache.corpus.documents import Document
from teachercache.corpus.sequences import tokenise
from teachercache.tokens.rows import Content

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}

# inserts a system turn of its own where there is none (as Qwen 2.5 does), and trims (as Llama 3 does)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
)
# moves what the system says into the last user turn (as Mistral does), and says it again at the end if told to
MOVES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.index >= messages | length - 1 %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
REPEATS = "{% for m in messages %}{{ m['content'] + '|' + m['content'] + '\n' }}{% endfor %}"
# lays out the reasoning of the last reply anew, an empty one where there is none, and drops that of others (as Qwen 3 does)
REASONS = (
    "{% for m in messages %}{% set thought = '' %}{% set answer = m['content'] %}{% if '</think>' in m['content'] %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set answer = m['content'].split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def found(build_tokenizer):
    """found(template, messages): (role, text) of every content, by a template's name or itself."""
    renderers = {}

    def find(template, messages):
        if template not in renderers:
            tokenizer = build_tokenizer(template if "{" not in template else None)
            if "{" in template:
                tokenizer.chat_template = template
            renderers[template] = ChatRenderer(tokenizer)
        text = renderers[template].text_if_any(messages)
        contents = contents_of(renderers[template], messages, text)
        places = [place for _, start, end in contents for place in (start, end)]
        assert places == sorted(places) and all(start < end for _, start, end in contents)
        return [(role, text[start:end]) for role, start, end in contents]

    return find


def turns(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


@pytest.mark.parametrize("template", ["chatml", "generation", "strips-thinking", DEFAULT_SYSTEM])
def test_every_message_is_found(found, template):
    messages = [SYSTEM, QUESTION, ANSWER, *turns(" And of Spain?\n", "Madrid, 東京 🙂\n")]
    assert found(template, messages) == [
        ("system", "Be brief."), ("user", QUESTION["content"]), ("assistant", "Paris."), ("user", "And of Spain?"),
        ("assistant", "Madrid, 東京 🙂"),
    ]  # fmt: skip
    assert found(template, messages[1:3]) == [("user", QUESTION["content"]), ("assistant", "Paris.")]


@pytest.mark.parametrize("template", ["chatml", "no-prompt", "thinking-prompt", DEFAULT_SYSTEM])
def test_contents_are_found_by_their_place(found, template):
    """Equal ones, and ones that look like the template."""
    contents = ["x", "x", "assistant", "user\n", "<|im_end|>", "[/INST]", "s", "You help.", "a\n", "\na"]
    assert [text for _, text in found(template, turns(*contents))] == [content.strip() for content in contents]


def test_reasoning_that_is_dropped_or_laid_out_anew_leaves_the_answer(found):
    messages = turns("a", "<think>\nhm\n</think>\n\nOne.", "b", "<think>well</think>Two.")
    assert [text for _, text in found(REASONS, messages)] == ["a", "One.", "b", "Two."]
    assert [text for _, text in found(REASONS, messages[:1] + turns("", "One.")[1:])] == ["a", "One."]
    assert [text for _, text in found("strips-thinking", messages)] == ["a", "One.", "b", "<think>well</think>Two."]


def test_what_a_template_moves_is_found_there_and_what_it_changes_or_repeats_is_not(found):
    messages = [SYSTEM, *turns("one", "two", "three", "four")]
    assert [text for _, text in found(MOVES, messages)] == ["one", "two", "Be brief.", "three", "four"]
    assert found("uppercase", turns("one", "TWO", "3")) == [("assistant", "TWO"), ("user", "3")]
    assert found(REPEATS, turns("one", "two")) == []
    assert found("chatml", turns("", "   ", "three")) == [("user", "three")]


def test_parts_and_tool_calls(found):
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '</>' }}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x "}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": [], "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": [{"type": "text", "text": "42"}]},
    ]
    assert found(template, messages) == [("user", "x y"), ("tool", "42")]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.text(alphabet="ab <|im_end>\n[/INST]é🙂:</think>", max_size=12), min_size=1, max_size=5),
    template=st.sampled_from(["chatml", "strips-thinking", "thinking-prompt", "no-prompt", DEFAULT_SYSTEM, REASONS]),
)
def test_what_is_found_was_said(found, contents, template):
    messages = turns(*contents)
    try:
        pieces = found(template, messages)
    except Unrenderable:
        return
    said_by = [(message["role"], said(message).strip()) for message in messages]
    said_by += [(role, text.rpartition("</think>")[2].strip()) for role, text in said_by]
    assert all(piece in said_by for piece in pieces)
    if not any("think>" in content for content in contents):
        assert pieces == [(message["role"], text) for message in messages if (text := said(message).strip())]


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("length", [7, 12, 64, 200])
def test_windows_and_packed_rows_hold_the_contents_that_lie_in_them(build_tokenizer, layout, length):
    conversations = [
        [SYSTEM, *turns(f"What is {number}? 東京", f"It is {number} 🙂🙃, of course.", "é?", "Ja.")]
        for number in range(9)
    ]
    documents = [Document(f"{n:032x}", 0, False, messages=messages) for n, messages in enumerate(conversations)]
    documents.append(Document("f" * 32, 0, False, text="Plain text, of no role at all."))
    tokenizer, sequence = build_tokenizer("chatml"), SequenceConfig(layout=layout, length=length)
    rows = tokenise(documents, tokenizer=tokenizer, sequence=sequence, store_text=True).rows
    expected = {}
    for document in documents[:-1]:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in document.messages).encode()
        role_of = np.full(len(text), -1)  # which message each byte of the text belongs to
        cursor = 0
        for index, message in enumerate(document.messages):
            cursor = text.index(b"\n", cursor) + 1
            role_of[cursor : cursor + len(message["content"].encode())] = index
            cursor = text.index(b"<|im_end|>", cursor) + len("<|im_end|>\n")
        expected[document.source_id] = text, role_of, document.messages
    seen = 0
    for segment in (segment for row in rows for segment in row.segments):
        if segment.source_id not in expected:
            assert segment.contents == ()
            continue
        text, role_of, messages = expected[segment.source_id]
        own = text[segment.byte_start : segment.byte_end]
        assert own == segment.text.encode()
        roles = iter(segment.contents)
        for index in sorted(set(role_of[segment.byte_start : segment.byte_end]) - {-1}):
            inside = np.flatnonzero(role_of[segment.byte_start : segment.byte_end] == index)
            content = next(roles)
            assert content == Content(messages[index]["role"], inside[0], inside[-1] + 1)
        assert next(roles, None) is None
        seen += len(segment.contents)
    assert seen >= 5
    bare = tokenise(documents, tokenizer=tokenizer, sequence=sequence, store_text=False).rows
    assert all(segment.contents == () and segment.text is None for row in bare for segment in row.segments)
    assert [row.row_id for row in bare] == [row.row_id for row in rows]


def test_all_messages_at_once_are_found_as_one_by_one(build_tokenizer):
    """Places that the one rendering shows are those that a rendering for each message shows."""
    from teachercache.corpus.contents import found_together, span_of

    taken = 0
    for template in (DEFAULT_SYSTEM, MOVES, REPEATS):
        tokenizer = build_tokenizer(None)
        tokenizer.chat_template = template
        renderer = ChatRenderer(tokenizer)
        for said_twice in ("Paris.", " Paris. ", "What is the capital of France?", "a\n\nb"):
            messages = [SYSTEM, QUESTION, {"role": "assistant", "content": said_twice}, QUESTION, ANSWER]
            text = renderer.text_if_any(messages)
            together = found_together(renderer, messages, text)
            if together is None:
                continue
            spans = [span_of(renderer, messages, index, text) for index in range(len(messages))]
            assert [(start, end) for _, start, end in together] == spans
            taken += 1
    assert taken >= 4
