"""The converted tokenizer of a GGUF file does what the file says: real files, written by llama.cpp's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachercache.errors import ModelError
from teachercache.models.gguf_files import CONVERSION, Surroundings, surroundings, with_space_prefix
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.tokens.fingerprint import tokenizer_fingerprint
from teachercache.tokens.prefix import own_prefix

from builders import tiny_model, tiny_tokenizer
from tokenizer_families import byte_level, sentencepiece_bpe, unigram

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁the", "▁cat", "▁sat", "the", "cat", "▁", "▁t", "▁c", "▁s", "he", "at", *"thecasron."]
CONTROL, BYTE, UNKNOWN, NORMAL = 3, 6, 2, 1
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def write_gguf(
    path: Path, *, model: str, pre: str = "default", template: str | None = None, without: str = "", **said: bool
) -> Path:
    """A tiny Llama with a SentencePiece (`llama`) or byte-level (`gpt2`) vocabulary; `said` are its `tokenizer.ggml.` keys,
    and `without` is the name of a weight that is left out."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if model == "llama":
        tokens = ["<unk>", "<s>", "</s>", *BYTES, *dict.fromkeys(PIECES)]
        kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(dict.fromkeys(PIECES))]
        writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)])
        ids = {"bos": 1, "eos": 2}
    else:
        backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
        tokens = sorted(backend["vocab"], key=backend["vocab"].__getitem__)
        kinds = [CONTROL, *[NORMAL] * (len(tokens) - 1)]
        writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
        ids = {"bos": 0, "eos": 0}
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    for name, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if template is not None:
        writer.add_chat_template(template)
    _add_weights(writer, len(tokens), without=without)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_weights(writer: Any, vocabulary: int, *, without: str) -> None:
    import gguf

    made = tiny_model(vocabulary=vocabulary, layers=1)
    config = made.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weights in made.state_dict().items():
        key = names.get_name(name, try_suffixes=(".weight",))
        if key is not None and name != "lm_head.weight" and key != f"{without}.weight":
            writer.add_tensor(key, weights.numpy().astype(np.float32))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.mark.parametrize(
    ("model", "said", "before", "after", "space"),
    [
        ("llama", {"add_bos_token": True, "add_eos_token": True, "add_space_prefix": False}, [1], [2], False),
        ("llama", {"add_bos_token": False, "add_space_prefix": True}, [], [], True),
        ("llama", {}, [1], [], True),  # SentencePiece: llama.cpp puts BOS there where the file says nothing
        ("gpt2", {"add_bos_token": True}, [0], [], False),
        ("gpt2", {}, [], [], False),
    ],
)
def test_bos_eos_and_the_space_before_a_text_are_as_the_file_says(tmp_path, model, said, before, after, space):
    file = write_gguf(tmp_path / "tiny.gguf", model=model, template=TEMPLATE, **said)
    tokenizer = load_tokenizer(str(file))
    ids, plain = tokenizer("the cat sat")["input_ids"], tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    assert ids == [*before, *plain, *after] and own_prefix(tokenizer) == tuple(before)
    assert tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁") == space
    assert tokenizer.decode(plain) == "the cat sat"
    assert tokenizer.chat_template == TEMPLATE
    # what is saved with a cache, and loaded in every actor
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again("the cat sat")["input_ids"] == ids and tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert load_causal_lm(str(file)).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("default", False)])
def test_what_a_byte_level_file_does_not_say_follows_its_kind(tmp_path, pre, bos):
    file = write_gguf(tmp_path / "tiny.gguf", model="gpt2", pre=pre)
    assert surroundings(file) == Surroundings(bos=bos, eos=False, space_prefix=None, tokens=300)


def test_copies_that_an_earlier_version_made_are_not_read(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", model="llama", add_bos_token=True)
    load_tokenizer(str(file))
    (folder,) = (tmp_path / "user-cache" / "teachercache" / "gguf").iterdir()
    assert folder.name.endswith(f"-{CONVERSION}")
    earlier = folder.with_name(folder.name.removesuffix(f"-{CONVERSION}"))
    folder.rename(earlier)
    (earlier / "tokenizer.json").write_text("{}")
    assert own_prefix(load_tokenizer(str(file))) == (1,)


@pytest.mark.parametrize("make", [sentencepiece_bpe, lambda: sentencepiece_bpe(style="legacy"),
                                  lambda: sentencepiece_bpe(style="gemma"), unigram, byte_level])  # fmt: skip
def test_a_space_before_a_text_is_put_and_taken(make):
    """In whatever place a kind of tokenizer has it; twice is once."""
    from tokenizers import Tokenizer

    description = json.loads(make().backend_tokenizer.to_str())
    for wanted in (True, False):
        changed = with_space_prefix(description, wanted=wanted)
        assert with_space_prefix(changed, wanted=wanted) == changed
        backend = Tokenizer.from_str(json.dumps(changed))
        first = backend.encode("cat sat", add_special_tokens=False).tokens[0]
        assert first.startswith(("▁", "Ġ")) == wanted


def test_a_file_without_a_weight_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", model="gpt2", without="output_norm")
    with pytest.raises(ModelError, match=r"model.gguf lacks model.norm.weight of LlamaForCausalLM"):
        load_causal_lm(str(file))
