"""Maps between vocabularies: a slow twin, real vocabularies, and files that others made."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from teachercache.errors import CacheDamaged, ModelError
from teachercache.tokens.token_bytes import TokenBytes
from teachercache.tokens.vocabulary_map import VocabularyMap, vocabulary_map

from tokenizer_families import LINES, REAL, SMALL, byte_level, sentencepiece_bpe, tiktoken_like

WITH_BYTES = [name for name in SMALL if "WordPiece" not in name]


def naive_first(teacher: Any, student: Any, index: int) -> int:
    """The student's own encoding of the teacher's token, where SentencePiece is concerned after a byte that never merges."""
    value = TokenBytes.of(teacher).values[index]
    assert value
    anchor = "\x01" if TokenBytes.of(student).family == "byte-fallback" else ""
    ids = student(anchor + value.decode(), add_special_tokens=False)["input_ids"]
    return ids[ids.index(student.convert_tokens_to_ids("<0x01>")) + 1] if anchor else ids[0]


@pytest.mark.parametrize("names", [*itertools.permutations(WITH_BYTES[:9], 2)], ids=" → ".join)
def test_every_token_maps_to_its_bytes_or_to_what_begins_them(names: tuple[str, str]) -> None:
    teacher, student = (SMALL[name]() for name in names)
    made, sides = vocabulary_map(teacher, student), (TokenBytes.of(teacher), TokenBytes.of(student))
    for index, value in enumerate(sides[0].values):
        first, same = (
            int(made.first_Vt[index]),
            [i for i, other in enumerate(sides[1].values) if value and other == value],
        )
        if sides[0].special_V[index]:
            continue
        assert bool(same) == bool(made.exact_Vt[index])
        if same:
            assert first in same
        elif value and first >= 0 and "NFC" not in names[1]:
            assert value.startswith(sides[1].values[first] or b"none")
    plain = [bool(value) for value in sides[0].values] & ~sides[0].special_V
    assert made.coverage == pytest.approx(made.exact_Vt[plain].mean())
    assert set(np.flatnonzero(made.emitted_Vs)) == {token for token in made.first_Vt.tolist() if token >= 0}


@pytest.mark.parametrize(
    "names",
    [("byte-level", "tiktoken"), ("tiktoken", "byte-level, prefix space"), ("byte-level", "SentencePiece BPE, Llama 2"),
     ("byte-level", "SentencePiece BPE, Gemma"), ("SentencePiece BPE", "byte-level")],
    ids=" → ".join,
)  # fmt: skip
def test_the_first_token_is_what_the_student_would_say_next(names: tuple[str, str]) -> None:
    teacher = tiktoken_like(size=600) if names[0] == "tiktoken" else SMALL[names[0]]()
    student = SMALL[names[1]]()
    made, tokens = vocabulary_map(teacher, student), TokenBytes.of(teacher)
    checked = 0
    for index, value in enumerate(tokens.values):
        if not value or made.exact_Vt[index] or not _is_text(value) or "\n" in value.decode() or "\t" in value.decode():
            continue
        if names[1].endswith("prefix space") and not value.startswith(b" "):
            continue  # that tokenizer always adds one
        assert made.first_Vt[index] == naive_first(teacher, student, index), value
        checked += 1
    assert checked > 10


def _is_text(value: bytes) -> bool:
    try:
        return bool(value.decode())
    except UnicodeDecodeError:
        return False


def test_bytes_that_are_no_text_map_too() -> None:
    """Parts of a character: to the longest merge of the student's own, and to single bytes of SentencePiece's."""
    teacher = byte_level(lines=["語言模型" * 20, "今天天气很好" * 20], size=300)
    tokens = TokenBytes.of(teacher)
    parts = [index for index, value in enumerate(tokens.values) if value and len(value) == 2 and not _is_text(value)]
    assert parts
    for student, family in ((byte_level(size=262), "byte-level"), (sentencepiece_bpe(size=120), "byte-fallback")):
        made, own = vocabulary_map(teacher, student), TokenBytes.of(student)
        assert own.family == family
        for index in parts:
            value, first = tokens.values[index] or b"", own.values[int(made.first_Vt[index])] or b""
            assert first == value if made.exact_Vt[index] else first == value[:1]


def test_special_tokens_map_by_role_and_by_what_they_say() -> None:
    teacher, student = byte_level(), sentencepiece_bpe()
    teacher.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    for tokenizer in (teacher, student):
        tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    teacher.add_tokens([AddedToken("<|only|>", special=True)])
    made = vocabulary_map(teacher, student)

    def mapped(token: str) -> str | None:
        index = int(made.first_Vt[teacher.convert_tokens_to_ids(token)])
        return student.convert_ids_to_tokens(index) if index >= 0 else None

    assert [mapped(token) for token in ("<|im_end|>", "<s>", "</s>", "<|tool|>")] == ["</s>", "<s>", "</s>", "<|tool|>"]
    assert mapped("<|pad|>") is None and mapped("<|only|>") is None


@pytest.mark.parametrize("name", SMALL)
def test_a_vocabulary_is_identical_to_itself_and_to_itself_with_padding(name: str) -> None:
    tokenizer = SMALL[name]()
    made = vocabulary_map(tokenizer, tokenizer)
    assert made.identical and made.first_Vt.tolist() == list(range(len(tokenizer)))
    assert made.exact_Vt.all() and made.emitted_Vs.all() and made.coverage == 1


def test_padding_does_not_count_but_other_tokens_do() -> None:
    plain, padded, longer, other = byte_level(), byte_level(), byte_level(), byte_level(size=390)
    padded.add_tokens([f"[PAD{index}]" for index in range(400, 420)])
    longer.add_tokens(["<tool>"])
    assert vocabulary_map(plain, padded).identical and vocabulary_map(padded, plain).identical
    assert vocabulary_map(plain, longer).identical  # the ids of the shorter one mean the same
    longer.add_tokens(["<other>"])
    padded.add_tokens(["<tool>"])
    assert not vocabulary_map(padded, tiktoken_like()).identical
    assert vocabulary_map(other, plain).identical  # which has all that the other has
    assert not vocabulary_map(plain, other).identical  # ids of the longer one mean nothing to the shorter
    swapped = byte_level(lines=LINES[:30])
    assert not vocabulary_map(plain, swapped).identical


def test_real_vocabularies_share_most_tokens() -> None:
    made = vocabulary_map(REAL["smollm2"](), REAL["deepseek"]())
    assert made.coverage > 0.85 and not made.identical
    assert (made.first_Vt < 0).sum() < 20  # special tokens of chat templates


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="slow"):
        vocabulary_map(byte_level(), ByT5Tokenizer())


@pytest.fixture(scope="module")
def small_map() -> VocabularyMap:
    return vocabulary_map(SMALL["byte-level"](), SMALL["SentencePiece BPE"]())


def test_a_saved_map_reads_back(tmp_path: Path, small_map: VocabularyMap) -> None:
    for name in ("one", "two"):
        small_map.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = VocabularyMap.load(tmp_path / "one")
    for field in dataclasses.fields(VocabularyMap):
        assert np.array_equal(getattr(loaded, field.name), getattr(small_map, field.name))
        assert type(getattr(loaded, field.name)) is type(getattr(small_map, field.name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_Vt": lambda a: a.astype(np.int64)}, "type int64"),
        ({"first_Vt": lambda a: a[None]}, "shape"),
        ({"first_Vt": lambda a: a - 1}, "exact says more"),
        ({"first_Vt": lambda a: np.where(a >= 0, 10**6, a).astype(np.int32)}, "does not have"),
        ({"first_Vt": lambda a: a - 7}, "does not have"),
        ({"exact_Vt": lambda a: a[1:]}, "exact says more"),
        ({"exact_Vt": lambda a: a.astype(np.uint8)}, "exact has shape"),
        ({"emitted_Vs": lambda a: ~a}, "not what first reaches"),
        ({"coverage": lambda _: 1.5}, "coverage is 1.5"),
        ({"coverage": lambda _: float("nan")}, "NaN is no JSON"),
        ({"coverage": lambda _: "all"}, "no flag and no share"),
        ({"identical": lambda _: 1}, "no flag and no share"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, small_map: VocabularyMap, changes: dict[str, Any], message: str
) -> None:
    forged = dataclasses.replace(
        small_map, **{name: change(getattr(small_map, name)) for name, change in changes.items()}
    )
    forged.save(tmp_path / "map")
    with pytest.raises(CacheDamaged, match=message) as caught:
        VocabularyMap.load(tmp_path / "map")
    assert "\n" not in str(caught.value) and "teachercache align" in str(caught.value)


def test_bytes_that_are_no_map_are_refused(tmp_path: Path, small_map: VocabularyMap) -> None:
    small_map.save(tmp_path / "map")
    data = (tmp_path / "map").read_bytes()
    version = data.replace(b'\\"version\\": 1', b'\\"version\\": 2')
    assert version != data
    for forged in (b"", b"x" * 100, data[:-1], version, data.replace(b"first", b"worst")):
        (tmp_path / "forged").write_bytes(forged)
        with pytest.raises(CacheDamaged, match="no vocabulary map"):
            VocabularyMap.load(tmp_path / "forged")
    with pytest.raises(CacheDamaged, match="no vocabulary map"):
        VocabularyMap.load(tmp_path / "nothing")
