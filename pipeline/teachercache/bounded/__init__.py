"""Programs that strangers wrote, in a process of their own with bounded time and memory.

A chat template is a program, which comes with a model or a cache, and so is a tokenizer's file: rules that rewrite texts, and
regular expressions. Jinja's sandbox keeps a template from files and from Python's objects, but not from running without end
or from making a text of gigabytes; a library in Rust that gets no memory ends its process. Nothing inside a process bounds
that: limits on loops and on multiplication leave filters, recursion, big numbers and C code that no Python code can
interrupt. So the kernel does it, of a child process that is reused for many rows:

    process.py     BoundedProcess       asks the child, and starts another one after a child that was ended
    child.py                            what runs there: one request after the other, under the kernel's limits
    templates.py   answer(request)      there: renders a chat template, as transformers does
    rendering.py   ChatTemplate         here: a template's text for a conversation
    trial.py       answer(request)      there: loads a tokenizer and gives it texts that are hard for it
    tokenizers.py  try_tokenizer        here: refuses a tokenizer that fails there

What only has to be read is bounded before it takes memory:

    strangers_json.py  parse_json       counts values before it makes them

The first answer costs about 0.2 s. A conversation asks for the texts that its spans need once or twice, a long one of many
turns once for every few of them.
"""

from teachercache.bounded.rendering import ChatTemplate, Text, Unrenderable

__all__ = ["ChatTemplate", "Text", "Unrenderable"]
