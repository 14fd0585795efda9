import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teachercache.corpus.chat import ChatRenderer, Unrenderable
from teachercache.errors import ModelError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


@pytest.fixture(scope="module")
def spoken(build_tokenizer):
    """spoken(template, messages): the rendered text and the pieces of it that the assistant wrote."""
    renderers = {}

    def render(template, messages):
        if template not in renderers:
            renderers[template] = ChatRenderer(build_tokenizer(template))
        text, spans = renderers[template].render(messages)
        assert [place for span in spans for place in span] == sorted(place for span in spans for place in span)
        return text, [text[start:end] for start, end in spans]

    return render


@pytest.mark.parametrize("template", ["chatml", "generation", "strips-thinking"])
def test_the_assistant_wrote_its_content_and_the_end_of_its_turn(spoken, template):
    text, pieces = spoken(template, [SYSTEM, QUESTION, ANSWER, user("And of Spain?"), assistant("Madrid.\n")])
    assert pieces == ["Paris.<|im_end|>", "Madrid.\n<|im_end|>"]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") and text.endswith(
        "<|im_end|>\n"
    )


@pytest.mark.parametrize("template", ["chatml", "generation", "strips-thinking", "thinking-prompt", "no-prompt"])
def test_content_that_looks_like_the_template(spoken, template):
    contents = ["assistant", "user\n", "<|im_end|>", "[/INST]", "Assistant", "s", "?", "<Assistant>"]
    messages = [turn for content in contents for turn in (user(content), assistant(content))]
    _, pieces = spoken(template, messages)
    assert len(pieces) == len(contents)
    assert all(piece.startswith(content.strip()) for piece, content in zip(pieces, contents, strict=True))


def test_earlier_reasoning_that_the_template_strips_is_not_there_to_learn(spoken):
    first, second = "<think>\nhm\n</think>\n\nOne.", "<think>\nwell\n</think>\n\nTwo."
    text, pieces = spoken("strips-thinking", [user("a"), assistant(first), user("b"), assistant(second)])
    assert "hm" not in text
    assert pieces == ["One.<|im_end|>", f"{second}<|im_end|>"]


def test_a_prompt_that_opens_a_thought_is_not_a_prefix_of_the_history(spoken):
    _, pieces = spoken(
        "thinking-prompt", [user("a"), assistant("<think>\nhm</think>One."), user("b"), assistant("Two.")]
    )
    assert pieces == ["One.<|endoftext|>", "Two.<|endoftext|>"]


def test_a_template_without_generation_prompt(spoken):
    text, pieces = spoken("no-prompt", [QUESTION, assistant(" Paris. "), user("Thanks"), assistant("So it is.")])
    assert pieces == ["Paris.<|endoftext|>", "So it is.<|endoftext|>"]
    assert text.count("[INST]") == 2


def test_a_conversation_may_begin_with_the_assistant(spoken):
    assert spoken("chatml", [assistant("Hello."), QUESTION])[1] == ["Hello.<|im_end|>"]


def test_white_space_can_be_the_end_of_a_turn(spoken, build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    text, spans = ChatRenderer(tokenizer).render([QUESTION, ANSWER, QUESTION, ANSWER])
    assert [text[start:end] for start, end in spans] == ["Paris.\n", "Paris.\n"]


def test_tool_calls_are_learned_and_tool_results_are_not(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    messages = [QUESTION, call, {"role": "tool", "content": "42"}, ANSWER]
    text, spans = ChatRenderer(tokenizer).render(messages)
    assert [text[start:end] for start, end in spans] == ['[{"name": "f"}]<|im_end|>', "Paris.<|im_end|>"]


def test_parts_of_content_are_text_too(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{{ '</>' }}{% endfor %}"
    )
    messages = [{"role": role, "content": [{"type": "text", "text": "x "}]} for role in ("user", "assistant")]
    text, spans = ChatRenderer(tokenizer).render(messages)
    assert [text[start:end] for start, end in spans] == ["x </>"]


def test_the_end_of_a_conversation_is_no_part_of_an_earlier_turn(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    text, spans = ChatRenderer(tokenizer).render([QUESTION, ANSWER, QUESTION, ANSWER])
    assert [text[start:end] for start, end in spans] == ["Paris.<|end|>", "Paris.<|end|>\n<|endoftext|>"]


def test_reasoning_that_stays_is_learned_without_a_generation_prompt(spoken):
    reply = "<think>\nhm\n</think>\n\nParis."
    assert spoken("no-prompt", [QUESTION, assistant(reply)])[1] == [f"{reply}<|endoftext|>"]


@pytest.mark.parametrize("generation", ["", "generation"])
def test_a_template_that_leaves_out_the_content_is_refused(build_tokenizer, generation):
    tokenizer = build_tokenizer()
    begin, end = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}" + begin + "{% for part in m.content if part.text is defined %}"
        "{{ part.text }}{% endfor %}{{ '<|im_end|>' }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(Unrenderable, match="leaves out what the assistant said"):
        ChatRenderer(tokenizer).render([QUESTION, ANSWER])


def test_what_cannot_be_told_apart_is_refused(spoken):
    with pytest.raises(Unrenderable, match="changes or leaves out what the assistant said"):
        spoken("uppercase", [QUESTION, ANSWER])
    with pytest.raises(Unrenderable, match="refuses it: System role not supported"):
        spoken("no-prompt", [SYSTEM, QUESTION, ANSWER])
    with pytest.raises(Unrenderable, match="refuses it"):
        spoken("chatml", [{"role": "user"}, ANSWER])


def test_a_conversation_without_the_assistant_has_no_spans(spoken):
    for template in ("chatml", "generation", "no-prompt"):
        assert spoken(template, [QUESTION])[1] == []


def test_no_template_and_a_broken_one_are_errors_of_the_tokenizer(build_tokenizer):
    with pytest.raises(ModelError, match="no chat template"):
        ChatRenderer(build_tokenizer())
    with pytest.raises(ModelError, match="does not parse"):
        ChatRenderer(build_tokenizer("broken")).render([QUESTION, ANSWER])


def test_the_date_in_a_template_is_fixed(spoken):
    assert spoken("dated", [QUESTION])[0].startswith("26 Jul 2024\n")


contents = st.text(st.sampled_from(list("ab \n<|>/é🙂")), max_size=8) | st.sampled_from(
    ["assistant", "<|im_end|>", "\n"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6))
def test_spans_equal_those_of_rendering_by_hand(spoken, turns):
    expected_text, expected = "", []
    for role, content in turns:
        expected_text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        expected += [f"{content}<|im_end|>"] if role == "assistant" else []
    messages = [{"role": role, "content": content} for role, content in turns]
    for template in ("chatml", "generation", "strips-thinking"):
        assert spoken(template, messages) == (expected_text, expected)


def test_a_long_conversation_of_many_turns_is_asked_for_in_bounded_parts(build_tokenizer):
    """All parts of its turns together are 60 times the conversation."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "word " * 1700 + "."} for n in range(120)]
    renderer = ChatRenderer(build_tokenizer("chatml"))
    tracemalloc.start()
    try:
        rendered = renderer.render(messages)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [rendered.text[start:end] for start, end in rendered.assistant_spans] == [
        message["content"] + "<|im_end|>" for message in messages[1::2]
    ]
    assert peak < 40 * len(rendered.text)
