"""Chat templates, rendered as transformers renders them: the same sandbox, filters, functions and blocks.

transformers itself takes a second to import. tests/bounded/test_templates.py compares the two.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, nodes, pass_eval_context
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Templates that print today's date would render another text tomorrow, and a job could not be resumed.
_TODAY = datetime(2024, 7, 26)


def answer(request: dict[str, Any]) -> Any:
    """Renders each conversation: its `text`, and `spans` of what the template declares as generated, or `refused`, the
    reason. Or says why there is nothing: `syntax` where the template is none, `exhausted` where the texts have more
    than `most` characters."""
    try:
        template = _compiled(request["template"])
    except TemplateSyntaxError as error:
        return {"syntax": str(error)}
    answers: list[dict[str, Any]] = []
    for variables in request["conversations"]:
        left = request["most"] - sum(len(answered.get("text", "")) for answered in answers)
        rendered = _rendered(template, {**request["variables"], **variables}, most=left)
        if rendered is None:
            return {"exhausted": "text"}
        answers.append(rendered)
    return answers


def _rendered(template: Any, variables: dict[str, Any], *, most: int) -> dict[str, Any] | None:
    generated: _Generated = template.environment.extensions[_Generated.identifier]
    generated.begin()
    try:
        for piece in template.generate(**variables, strftime_now=_TODAY.strftime):
            generated.append(piece)
            if generated.length > most:
                return None
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        return {"refused": " ".join(str(error)[:1000].split())}
    return {"text": "".join(generated.pieces), "spans": generated.spans}


class _Generated(Extension):
    """`{% generation %}` blocks: what is in them is what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def begin(self) -> None:
        self.pieces: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.length = 0

    def append(self, piece: str) -> None:
        self.pieces.append(piece)
        self.length += len(piece)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _said(self, context: nodes.EvalContext, caller: Any) -> str:
        text: str = caller()
        if text:
            self.spans.append((self.length, self.length + len(text)))
        return text


@functools.lru_cache(16)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generated, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template)
    except (MemoryError, RecursionError, TemplateSyntaxError):
        raise
    except Exception as error:  # of Python, in which jinja writes it, and of jinja: blocks in each other, huge numbers
        raise TemplateSyntaxError(str(error), 0) from None


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
