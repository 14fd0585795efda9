import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from teachercache.errors import ModelError
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint, vocabulary_size

LINES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


def build(*, lines=LINES, size=300, bos=False, **options):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


@pytest.mark.parametrize("bos", [False, True])
def test_a_saved_and_reloaded_tokenizer_has_the_same_fingerprint(tmp_path, bos):
    tokenizer = build(bos=bos)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    assert template_fingerprint(copy) == template_fingerprint(tokenizer) is not None
    assert len(tokenizer_fingerprint(tokenizer)) == 64


def test_state_and_names_do_not_count():
    tokenizer, expected = build(), tokenizer_fingerprint(build())
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    tokenizer.name_or_path, tokenizer.model_max_length = "elsewhere", 7
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.pad_token = "</s>"
    tokenizer(LINES, padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation
    assert tokenizer_fingerprint(tokenizer) == expected


def added(token):
    tokenizer = build()
    tokenizer.add_tokens([token])
    return tokenizer


def with_lower_case():
    from tokenizers import normalizers

    tokenizer = build()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        lambda: build(lines=LINES[:1]),
        lambda: build(size=290),
        lambda: build(bos=True),
        lambda: added("<tool>"),
        lambda: added(AddedToken("<tool>", special=True)),
        lambda: build(split_special_tokens=True),
        with_lower_case,
    ],
)
def test_what_changes_ids_changes_the_fingerprint(other):
    assert tokenizer_fingerprint(other()) != tokenizer_fingerprint(build())


def test_the_order_of_merges_counts():
    import json

    tokenizer = build()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"][:2] = description["model"]["merges"][1::-1]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer_fingerprint(swapped) != tokenizer_fingerprint(tokenizer)


def test_vocabulary_size_counts_added_tokens():
    assert vocabulary_size(build()) == len(build())
    assert vocabulary_size(added("<tool>")) == len(build()) + 1


def test_templates_have_a_fingerprint_of_their_own():
    tokenizer = build()
    assert template_fingerprint(tokenizer) is None
    tokenizer.chat_template = "{{ messages }}"
    first = template_fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages }}!"
    assert template_fingerprint(tokenizer) != first


def test_slow_tokenizers_are_refused():
    with pytest.raises(ModelError, match="slow"):
        tokenizer_fingerprint(ByT5Tokenizer())
