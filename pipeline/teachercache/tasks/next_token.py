"""The token that follows each position: causal language models, the default."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from teachercache.tasks.contract import Task
from teachercache.tokens.rows import TokenRow


class NextToken(Task):
    """See `Task`. Outcomes are the tokens of the tokenizer."""

    name = "next-token"
    is_causal = True
    heads = (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    )  # the second: decoders of text beside another encoder
    labels_are_text = True

    def labels_N(self, row: TokenRow) -> NDArray[Any]:
        """See `Task`."""
        return row.labels_N()


NEXT_TOKEN = NextToken()
