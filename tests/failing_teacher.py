"""A tiny teacher whose own code fails on four tokens: one ends its process, one raises, one never returns, and after one every
call raises, as after an assertion on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

from builders import tiny_teacher

EXITS, RAISES, HANGS, POISONS = "K", "V", "W", "Z"  # tokens that no other text of the tests has, nor a probe of models
CODE = """
import os
import time

from transformers import LlamaForCausalLM


class FailingLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.poisoned, self.rows = False, 0
        self.model.register_forward_pre_hook(self.fail, with_kwargs=True)

    def fail(self, module, arguments, named):
        time.sleep(self.config.seconds)
        self.rows += len(named["input_ids"])
        if 0 < self.config.most_rows < self.rows:
            print("memory is full")
            os._exit(4)
        seen = set(named["input_ids"].flatten().tolist())
        fails_on = self.config.fails_on
        if fails_on["exits"] in seen:
            print("this token ends its process")
            os._exit(3)
        if fails_on["raises"] in seen:
            raise ValueError("this token is not liked")
        if fails_on["hangs"] in seen:
            time.sleep(3600)
        self.poisoned = self.poisoned or fails_on["poisons"] in seen
        if self.poisoned:
            raise RuntimeError("device-side assert triggered")
"""


def failing_teacher(folder: Path, *, seconds: float = 0.0, most_rows: int = 0) -> Path:
    """A folder with the model, its code and its tokenizer; a forward pass takes at least so many seconds, and a process that
    has read `most_rows` rows ends, whichever they are."""
    from transformers import AutoTokenizer

    tiny_teacher(folder, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = {"exits": EXITS, "raises": RAISES, "hangs": HANGS, "poisons": POISONS}
    config = json.loads((folder / "config.json").read_text())
    config["fails_on"] = {name: tokenizer(word)["input_ids"][0] for name, word in words.items()}
    config |= {"seconds": seconds, "most_rows": most_rows}
    config["auto_map"] = {"AutoModelForCausalLM": "failing.FailingLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "failing.py").write_text(CODE)
    return folder
