import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teachercache.config import CorpusConfig, SequenceConfig
from teachercache.corpus.documents import documents
from teachercache.corpus.sequences import tokenise
from teachercache.corpus.windows import byte_offsets, window_bounds
from teachercache.errors import ModelError

PROSE = "An iterable is an object capable of returning its members. Wörter, naïve café, 東京 🙂🙃!\n" * 4
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "The capital is Paris."}

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def made_of(texts, **options):
    return list(documents([{"text": text} for text in texts], CorpusConfig(source="-", **options)))


def chats(*conversations, **options):
    config = CorpusConfig(source="-", messages_field="messages", **options)
    return list(documents([{"messages": list(messages)} for messages in conversations], config))


def tokenised(items, tokenizer, *, store_text=True, **options):
    return tokenise(items, tokenizer=tokenizer, sequence=SequenceConfig(**options), store_text=store_text)


def test_window_bounds_at_their_edges():
    assert window_bounds(1, length=4) == [(0, 1)]
    assert window_bounds(4, length=4) == [(0, 4)]
    assert window_bounds(5, length=4) == [(0, 4), (3, 5)]
    assert window_bounds(7, length=4) == [(0, 4), (3, 7)]
    assert window_bounds(8, length=4) == [(0, 4), (3, 7), (6, 8)]
    assert window_bounds(3, length=2) == [(0, 2), (1, 3)]


@given(st.integers(2, 300), st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once_and_in_order(tokens, length):
    bounds = window_bounds(tokens, length=length)
    assert [label for start, stop in bounds for label in range(start + 1, stop)] == list(range(1, tokens))
    assert all(2 <= stop - start <= length for start, stop in bounds)


@given(st.text())
def test_byte_offsets_equal_encoding_every_prefix(text):
    assert byte_offsets(text).tolist() == [len(text[:end].encode()) for end in range(len(text) + 1)]


@pytest.mark.parametrize("bos", [False, True])
@relaxed
@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=5), length=st.integers(3, 40))
def test_windows_reproduce_the_tokens_of_their_document(build_tokenizer, bos, texts, length):
    tokenizer = TOKENIZERS.setdefault(bos, build_tokenizer(bos=bos))
    items = made_of([text for text in dict.fromkeys(texts) if text.strip()])
    result = tokenised(items, tokenizer, length=length)
    assert not result.quarantined and len(result.rows) == len(items) + result.extra_windows
    assert len({row.row_id for row in result.rows}) == len(result.rows)
    rows = iter(result.rows)
    for item in items:
        ids = [*tokenizer(item.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        assert not bos or ids[0] == tokenizer.bos_token_id
        first = next(rows)
        rejoined, labels = first.input_ids_S.tolist(), first.labels_N().tolist()
        while len(rejoined) < len(ids):
            row = next(rows)
            window = row.input_ids_S[bos:].tolist()
            assert not bos or row.input_ids_S[0] == tokenizer.bos_token_id
            assert rejoined[-1] == window[0]
            rejoined += window[1:]
            labels += row.labels_N().tolist()
        assert rejoined == ids and labels == ids[1:]


TOKENIZERS = {}


def test_spans_are_bytes_of_the_document(tokenizer):
    (document,) = made_of([PROSE])
    result = tokenised([document], tokenizer, length=16)
    raw, end = PROSE.encode(), 0
    assert result.windowed_documents == 1 and result.extra_windows == len(result.rows) - 1 > 10
    for row in result.rows:
        (segment,) = row.segments
        assert (segment.source_id, segment.occurrence, segment.start) == (document.source_id, 0, 0)
        assert raw[segment.byte_start : segment.byte_end].decode() == segment.text
        assert segment.byte_start <= end < segment.byte_end
        end = segment.byte_end
        assert row.length <= 16 and row.input_ids_S.dtype == np.int32 and row.target_mask_S.dtype == np.bool_
    assert result.rows[0].segments[0].byte_start == 0 and end == len(raw)


def test_tokens_without_text_have_no_bytes(build_tokenizer):
    (row,) = tokenised(made_of(["café"]), build_tokenizer(bos=True), length=64).rows
    (segment,) = row.segments
    assert (segment.byte_start, segment.byte_end, segment.text) == (0, 5, "café")
    last = tokenised(made_of(["dog dog"]), build_tokenizer(bos=True), length=3).rows[-1].segments[0]
    assert last.byte_end == 7 and last.text


def test_text_is_kept_only_when_asked_for(tokenizer):
    rows = tokenised(made_of([PROSE]), tokenizer, store_text=False, length=16).rows
    assert {segment.text for row in rows for segment in row.segments} == {None}
    kept = tokenised(made_of([PROSE]), tokenizer, length=16).rows
    assert [row.row_id for row in rows] == [row.row_id for row in kept]


def test_eos_ends_a_document_once(tokenizer):
    eos = tokenizer.eos_token_id
    (row,) = tokenised(made_of(["dog"]), tokenizer).rows
    assert row.input_ids_S[-1] == eos and row.labels_N()[-1] == eos
    (row,) = tokenised(made_of(["dog<|endoftext|>"]), tokenizer).rows
    assert (row.input_ids_S == eos).sum() == 1
    (row,) = tokenised(made_of(["dog and dog"]), tokenizer, add_eos=False).rows
    assert eos not in row.input_ids_S


def test_what_cannot_be_tokenised_is_quarantined_with_its_reason(tokenizer):
    items = made_of(["a", "", "x\ud800", "The dog"])
    result = tokenised(items, tokenizer, add_eos=False)
    reasons = {each.reason: each for each in result.quarantined}
    assert set(reasons) == {"fewer than 2 tokens", "empty text", "not valid Unicode: lone surrogate at character 1"}
    assert reasons["fewer than 2 tokens"].excerpt == "a"
    assert reasons["not valid Unicode: lone surrogate at character 1"].excerpt == r"x\ud800"
    assert len(result.rows) == 1 and len(items) == len(result.rows) + len(result.quarantined)


def test_nothing_in_is_nothing_out(tokenizer):
    result = tokenised([], tokenizer)
    assert (result.rows, result.quarantined, result.windowed_documents, result.extra_windows) == ([], [], 0, 0)


def test_long_documents_warn_nobody_and_earlier_truncation_cuts_nothing(tokenizer, capfd):
    tokenizer("some words to cut", truncation=True, max_length=2)
    result = tokenised(made_of([PROSE]), tokenizer, length=1000)
    assert result.rows[0].length > tokenizer.model_max_length
    assert capfd.readouterr().err == ""


def test_rows_do_not_depend_on_their_neighbours(tokenizer):
    items = made_of([f"{PROSE[: 20 + number]}{number}" for number in range(300)], held_out=0.2)
    together = tokenised(items, tokenizer, length=32)
    alone = [row for item in reversed(items) for row in tokenised([item], tokenizer, length=32).rows]
    assert {row.row_id: row.input_ids_S.tobytes() for row in together.rows} == {
        row.row_id: row.input_ids_S.tobytes() for row in alone
    }


def test_all_windows_of_a_document_are_on_one_side(tokenizer):
    items = made_of([f"{number} {PROSE}" for number in range(30)], held_out=0.4)
    sides = {}
    for row in tokenised(items, tokenizer, length=16).rows:
        sides.setdefault(row.segments[0].source_id, set()).add(row.held_out)
    assert sorted(len(side) for side in sides.values()) == [1] * 30
    assert {True, False} == set().union(*sides.values())


def test_repeated_documents_have_rows_of_their_own(tokenizer):
    rows = tokenised(made_of([PROSE, PROSE], deduplicate=False), tokenizer, length=64).rows
    assert len({row.row_id for row in rows}) == len(rows)
    assert {row.segments[0].occurrence for row in rows} == {0, 1}


def test_windows_inside_one_character_have_names_of_their_own(tokenizer):
    rows = tokenised(made_of(["𝄞𝄞"]), tokenizer, length=2).rows
    spans = [(row.segments[0].byte_start, row.segments[0].byte_end) for row in rows]
    assert len(set(spans)) < len(spans) and len({row.row_id for row in rows}) == len(rows)


def test_the_names_of_rows_are_pinned(tokenizer):
    # caches of different teachers and dates join on these names
    (row,) = tokenised(made_of(["The dog."]), tokenizer).rows
    assert row.segments[0].source_id == "5cc4ebfa4b93e0bb830da7c364b5cd44"
    assert row.row_id == "f991c1d0e89b3a02c2dca874cf3f2b72"


def test_slow_tokenizers_are_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="character offsets"):
        tokenised(made_of(["a b"]), ByT5Tokenizer())


# --- packed ---


def packed_case(tokenizer, length):
    items = made_of([f"{number}: {PROSE[: number * 5 % 90]}" for number in range(120)], held_out=0.3)
    plain = tokenised(items, tokenizer, length=length)
    return items, plain, tokenised(items, tokenizer, length=length, layout="packed")


@pytest.mark.parametrize("length", [12, 64])
def test_packed_rows_hold_every_window_once(tokenizer, length):
    _, plain, packed = packed_case(tokenizer, length)
    found = {}
    for row in packed.rows:
        assert row.length <= length
        stops = [*[segment.start for segment in row.segments[1:]], row.length]
        for segment, stop in zip(row.segments, stops, strict=True):
            key = (segment.source_id, segment.byte_start, segment.byte_end, row.held_out)
            found[key] = (row.input_ids_S[segment.start : stop], row.target_mask_S[segment.start : stop])
    assert len(found) == len(plain.rows) == sum(len(row.segments) for row in packed.rows)
    for row in plain.rows:
        (segment,) = row.segments
        ids, targets = found[segment.source_id, segment.byte_start, segment.byte_end, row.held_out]
        assert (ids == row.input_ids_S).all() and (targets == row.target_mask_S).all()
    assert packed.extra_windows == plain.extra_windows and len(packed.rows) < len(plain.rows)


def test_packed_segments_are_isolated(tokenizer):
    items, _, packed = packed_case(tokenizer, 64)
    held_out = {item.source_id: item.held_out for item in items}
    assert any(len(row.segments) > 2 for row in packed.rows)
    for row in packed.rows:
        assert {held_out[segment.source_id] for segment in row.segments} == {row.held_out}
        starts = [segment.start for segment in row.segments]
        position_ids = row.position_ids_S()
        assert (position_ids[starts] == 0).all() and (np.diff(position_ids)[np.array(starts[1:], int) - 1] < 0).all()
        last_tokens = np.array([*starts[1:], row.length]) - 1
        assert not row.target_mask_S[last_tokens].any()
        assert row.target_mask_S.sum() == row.length - len(starts)


def test_packing_depends_on_the_set_of_documents_alone(tokenizer):
    items, _, packed = packed_case(tokenizer, 64)
    again = tokenised(items[::-1], tokenizer, length=64, layout="packed")
    assert [row.row_id for row in again.rows] == [row.row_id for row in packed.rows]
    assert len({row.row_id for row in packed.rows}) == len(packed.rows)


# --- chat ---


def labels_of(row, tokenizer):
    return tokenizer.decode(row.labels_N())


@pytest.mark.parametrize("template", ["chatml", "generation", "strips-thinking"])
def test_only_assistant_tokens_are_targets(build_tokenizer, template):
    tokenizer = build_tokenizer(template)
    (row,) = tokenised(chats([QUESTION, ANSWER, QUESTION, ANSWER]), tokenizer, length=512).rows
    assert labels_of(row, tokenizer) == "The capital is Paris.<|im_end|>" * 2
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    first = int(np.flatnonzero(row.target_mask_S)[0])
    # the first assistant token is predicted from the last token of the prompt
    assert row.input_ids_S[: first + 1].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert not row.target_mask_S[-1] and row.segments[0].text.startswith("<|im_start|>user")


def test_chat_gets_no_special_tokens_beyond_the_template(build_tokenizer):
    tokenizer = build_tokenizer("chatml", bos=True)
    (row,) = tokenised(chats([QUESTION, ANSWER]), tokenizer, length=512).rows
    assert tokenizer.bos_token_id not in row.input_ids_S and tokenizer.eos_token_id not in row.input_ids_S


# white space at the start of a turn may merge with the end of the template's header into one token
turn_texts = st.text(min_size=1, max_size=12).filter(lambda text: not text[0].isspace())


@relaxed
@given(turns=st.lists(turn_texts, min_size=2, max_size=5), length=st.integers(2, 60))
def test_assistant_tokens_are_each_learned_once_in_windows(build_tokenizer, turns, length):
    tokenizer = TOKENIZERS.setdefault("chatml", build_tokenizer("chatml"))
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    result = tokenised(chats(messages), tokenizer, length=length)
    spoken = "".join(f"{turn}<|im_end|>" for turn in turns[1::2])
    labels = [label for row in result.rows for label in row.labels_N()]
    assert tokenizer.decode(labels) == spoken
    assert all(row.positions for row in result.rows) and result.extra_windows == len(result.rows) - 1


def test_windows_of_a_long_prompt_hold_nothing_to_learn_and_are_counted(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    asked = {"role": "user", "content": PROSE}
    result = tokenised(chats([asked, ANSWER]), tokenizer, length=32)
    assert result.windows_without_targets > 3 and result.windowed_documents == 1
    assert "".join(labels_of(row, tokenizer) for row in result.rows) == "The capital is Paris.<|im_end|>"
    text = "".join(row.segments[0].text for row in result.rows)
    assert text.endswith("Paris.<|im_end|>\n")


def test_conversations_that_cannot_be_used_are_quarantined(build_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    items = chats([QUESTION], [system, QUESTION, ANSWER], [QUESTION, ANSWER])
    result = tokenised(items, build_tokenizer("no-prompt"), length=64)
    assert sorted(each.reason for each in result.quarantined) == [
        "no assistant tokens",
        "the chat template refuses it: System role not supported",
    ]
    assert "capital of France" in result.quarantined[0].excerpt and len(result.rows) == 1


def test_a_token_that_reaches_into_the_answer_is_learned(build_tokenizer):
    from teachercache.corpus.encoding import assistant_targets

    chars_S2 = np.array([[0, 0], [0, 3], [3, 6], [6, 8], [8, 8], [8, 9]])
    # the answer is characters 5 to 8: a token over its start, one inside, none of those without text
    assert assistant_targets(chars_S2, [(5, 8)], characters=9).tolist() == [False, True, True, False, False, False]


def test_chat_packs_too(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    items = chats(*[[{"role": "user", "content": f"{n}?"}, ANSWER] for n in range(12)], held_out=0.3)
    result = tokenised(items, tokenizer, length=128, layout="packed")
    assert len(result.rows) < 12 and sum(len(row.segments) for row in result.rows) == 12
    for row in result.rows:
        assert labels_of(row, tokenizer) == "The capital is Paris.<|im_end|>" * len(row.segments)
