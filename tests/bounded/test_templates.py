"""Chat templates end: with what transformers renders, or in one line within seconds and bounded memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from teachercache.bounded import ChatTemplate, Unrenderable, rendering
from teachercache.errors import JobFailed, ModelError

from chat_templates import TEMPLATES

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>2 + 2</b>? \U0001f642 \ud800"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour.",
     "tool_calls": [{"name": "add", "arguments": {"b": 1, "a": "é"}}]},
    {"role": "user", "content": "and 3 + 3?"},
    {"role": "assistant", "content": "Six."},
]  # fmt: skip
OTHERS = {
    "json": "{{ messages | tojson }}{{ messages[2].tool_calls | tojson(indent=2) }}"
    "{{ [1, 'a'] | tojson(separators=(',', ':')) }}",
    "controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "trimmed": "\n{% if true %}\n   {%- for m in messages -%}\n {{ m.role }}\n{% endfor %}\n{% endif %}\nend\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% generation %}!{% endgeneration %}{% endfor %}",
    "special": "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents }}{{ add_generation_prompt }}{{ nothing }}",
    "refuses": "{{ raise_exception('Conversation roles must alternate') }}",
    "dunder": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "changes": "{{ messages.append({}) }}",
    "unknown": "{{ messages[9].content }}",
}  # fmt: skip


def of(template: str, *, seconds: float = 4) -> ChatTemplate:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = SimpleNamespace(get_chat_template=lambda: template, special_tokens_map=tokens)
    return ChatTemplate(tokenizer, seconds=seconds)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), *OTHERS.values()], ids=[*TEMPLATES, *OTHERS])
def test_templates_are_rendered_as_transformers_renders_them(template: str, prompt: bool) -> None:
    messages = MESSAGES[1:] if "refused" in template or "supported" in template else MESSAGES
    options: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt}
    if "strftime_now" in template:
        options["strftime_now"] = lambda form: "26 Jul 2024"
    try:
        expected: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask="generation %" in template, **options
        )
    except Exception as error:
        with pytest.raises((Unrenderable, ModelError)) as caught:
            of(template).rendered(messages, prompt=prompt)
        assert str(error) in str(caught.value)
        return
    [text], spans = expected
    assert of(template).rendered(messages, prompt=prompt) == (text, [*spans[0]] if spans else [])


def test_several_conversations_are_rendered_at_once() -> None:
    template = of(TEMPLATES["no-prompt"])
    whole, refused, last = template.rendered_all([(MESSAGES[1:3], False), (MESSAGES[:1], False), (MESSAGES[3:], True)])
    assert whole == template.rendered(MESSAGES[1:3]) and last == template.rendered(MESSAGES[3:], prompt=True)
    assert isinstance(refused, Unrenderable) and "System role not supported" in str(refused)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"


def again(first: str, change: str) -> str:
    return "{% set n = namespace(" + first + ") %}{% for i in range(99) %}{% set " + change + " %}{% endfor %}"


ENDS = "{% endfor %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops without output": (f"{LOOPS}{ENDS}", "takes more than"),
    "loops with output": (f"{LOOPS}ha{ENDS}", "takes more than|writes more than"),
    "a number without end": ("{{ (9 ** (9 ** 9)) % 7 }}", "takes more than"),
    "text doubled": (again("t='ha'", "n.t = n.t ~ n.t"), "takes more than"),
    "text multiplied": ("{{ ('ha' * 10 ** 10) | length }}", "takes more than"),
    "text of many characters": ("{{ 'ha' * 10 ** 7 }}", "takes more than|writes more than"),
    "wide": ("{{ '%099999999999d' % 1 }}", "takes more than|refuses it"),
    "centred": ("{{ 'a' | center(10 ** 11) }}", "takes more than"),
    "indented": ("{{ [1] | tojson(indent=10 ** 11) }}", "takes more than"),
    "a list doubled": (again("l=[1]", "n.l = n.l + n.l"), "takes more than"),
    "lorem ipsum": ("{{ lipsum(n=10 ** 9) }}", "takes more than"),
    "replaced": (again("t='a'", "n.t = n.t.replace('a', 'aaaaaaaa')"), "takes more than"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself|takes more than"),
    "two macros": ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}", "calls itself|takes more than"),
    "blocks in blocks": ("{% if 1 %}" * 9999 + "{% endif %}" * 9999, "calls itself|does not parse|takes more than"),
    "brackets in brackets": ("{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", "calls itself|does not parse|takes more than"),
    "a long sum": ("{{ " + "1 + " * 99999 + "1 }}", "calls itself|does not parse|takes more than"),
    "spans without end": (f"{LOOPS}{{% generation %}}a{{% endgeneration %}}{ENDS}", "takes more than|writes more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_without_bounds_end_in_a_line(name: str) -> None:
    template, match = HOSTILE[name]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((ModelError, Unrenderable), match=match) as caught:
        of(template, seconds=0.2).rendered(MESSAGES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert of(TEMPLATES["chatml"]).rendered(MESSAGES[:1]).text.startswith("<|im_start|>system")


def test_a_long_conversation_is_given_up_alone() -> None:
    endless = "{% for m in messages %}{% if m.content | length > 99 %}" + LOOPS + ENDS + "{% endif %}{% endfor %}ok"
    template = of(endless, seconds=0.2)
    with pytest.raises(Unrenderable, match="takes more than"):
        template.rendered([{"role": "user", "content": "a" * (rendering.SHORT + 1)}])
    assert template.rendered(MESSAGES).text == "ok"


def test_a_long_conversation_that_the_template_can_write_is_written() -> None:
    messages = [{"role": "user", "content": "é\U0001f642 " * 10**6}, {"role": "assistant", "content": "b" * 10**7}]
    text = of(TEMPLATES["chatml"]).rendered(messages).text
    assert all(message["content"] in text for message in messages)


def test_nothing_of_the_environment_or_of_files_is_given_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The sandbox keeps templates from both; were there a hole in it, a child has no credentials and cannot write."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    child = rendering.BoundedProcess("templates")
    child.ask({"template": "a", "variables": {}, "conversations": [{}], "most": 9}, seconds=5, memory=2**28, most=999)
    process = child._process
    assert process is not None
    with Path(f"/proc/{process.pid}/environ").open() as stream:
        assert "secret" not in stream.read()
    with Path(f"/proc/{process.pid}/limits").open() as stream:
        [sizes] = [line.split() for line in stream if line.startswith("Max file size")]
    assert sizes[3:5] == ["0", "0"]


def test_a_child_that_somebody_ended_is_followed_by_another() -> None:
    template = of(TEMPLATES["chatml"])
    text = template.rendered(MESSAGES).text
    process = rendering._process(os.getpid())._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ModelError):
        template.rendered(MESSAGES)
    assert template.rendered(MESSAGES).text == text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_child_that_ended_for_another_reason_is_no_fault_of_the_template(number: signal.Signals) -> None:
    template = of(TEMPLATES["chatml"])
    text = template.rendered(MESSAGES).text
    process = rendering._process(os.getpid())._process
    assert process is not None
    os.kill(process.pid, number)
    process.wait()
    with pytest.raises(JobFailed, match=f"ended with {number.name}"):
        template.rendered(MESSAGES)
    assert template.rendered(MESSAGES).text == text


def test_a_number_that_python_refuses_is_a_template_that_does_not_parse() -> None:
    with pytest.raises(ModelError, match="does not parse"):
        of("{{ " + "9" * 5000 + " }}").rendered(MESSAGES)


def test_a_fork_has_a_child_of_its_own() -> None:
    template = of(TEMPLATES["chatml"])
    text = template.rendered(MESSAGES).text
    pid = os.fork()
    if pid == 0:
        os._exit(0 if template.rendered(MESSAGES).text == text else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.rendered(MESSAGES).text == text
