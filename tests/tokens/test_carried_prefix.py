"""A choice of what rows begin with is carried into the tokenizer that goes with them, of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teachercache.models.loading import load_tokenizer, save_tokenizer
from teachercache.tokens.carried_prefix import readers_prefix, with_prefix
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint
from teachercache.tokens.prefix import own_prefix, row_prefix

from chat_templates import CHATML, GLM, NO_PROMPT
from tokenizer_families import SMALL, byte_level

TEXT = " a  text\nof 1.5 lines,"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("choice", ["auto", "bos", "eos", "none"])
def test_a_tokenizer_begins_texts_as_chosen_and_is_else_what_it_was(tmp_path: Path, family: str, choice: Any) -> None:
    """Also saved and loaded; where it has no such token, all is left. Its own is not touched."""
    tokenizer = SMALL[family]()
    before, own = tokenizer_fingerprint(tokenizer), own_prefix(tokenizer)
    changed = with_prefix(tokenizer, choice, chats=False)
    has = choice in ("auto", "none") or getattr(tokenizer, f"{choice}_token_id") is not None
    wanted = row_prefix(tokenizer, choice if has else "auto", chats=False)
    assert wanted == readers_prefix(tokenizer, choice, chats=False)
    assert (changed is tokenizer) == (wanted == own) and tokenizer_fingerprint(tokenizer) == before

    save_tokenizer(tmp_path, changed, fingerprint=tokenizer_fingerprint(changed))
    loaded = load_tokenizer(str(tmp_path))
    plain, whole = (tokenizer(TEXT, return_offsets_mapping=True, add_special_tokens=s) for s in (False, True))
    found = loaded(TEXT, return_offsets_mapping=True)
    assert tuple(found["input_ids"]) == (*wanted, *whole["input_ids"][len(own) :])
    assert found["offset_mapping"][len(wanted) :][: len(plain["input_ids"])] == plain["offset_mapping"]
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == plain["input_ids"]
    assert with_prefix(loaded, choice, chats=False) is loaded


@pytest.mark.parametrize("template", [CHATML, GLM, NO_PROMPT.replace("<|endoftext|>", "</s>")])
@pytest.mark.parametrize("choice", ["auto", "bos", "eos", "none"])
def test_a_chat_template_begins_conversations_as_chosen(template: str, choice: Any) -> None:
    """Rows of a cache have it before every window, in front of what the template writes: so has the changed template, once."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    begins = {"bos": "<s>", "eos": "</s>"}.get(choice, "")
    written = tokenizer.apply_chat_template(CHAT, tokenize=False)
    expected = written if written.startswith(begins) else begins + written
    changed = with_prefix(tokenizer, choice, chats=True)
    assert changed.apply_chat_template(CHAT, tokenize=False) == expected
    assert tokenizer_fingerprint(changed) == tokenizer_fingerprint(tokenizer)
    assert with_prefix(changed, choice, chats=True) is changed
    assert (changed is tokenizer) == (template_fingerprint(changed) == template_fingerprint(tokenizer))
