"""A cache's rows in the tokens of another tokenizer: what is aligned, what is learned, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from teachercache.cache import SPLITS, Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.errors import CacheDamaged, CacheError, JobFailed, ModelError, RecipeError
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.align.job import commit, run_align
from teachercache.precompute.align.plan import make_plan
from teachercache.precompute.align.units import align_shard
from teachercache.precompute.capture.job import run_precompute
from teachercache.stream.alignment import alignment_for
from teachercache.stream.tokenizers import teacher_tokenizer

from builders import (
    aligned,
    other_student,
    other_tokenizer,
    sentences,
    tiny_cache,
    tiny_recipe,
    tiny_teacher,
    write_corpus,
)

TEXTS = [*sentences(30), "naïve café — 日本語 🙂👩‍👩‍👧 ok", "two\n\nlines\tand  spaces  ", "ﷺ مرحبا x"]


@pytest.fixture(scope="module", params=["documents", "packed"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache with an alignment, and the student."""
    folder = tmp_path_factory.mktemp(request.param)
    cache = tiny_cache(folder, texts=TEXTS, sequence={"length": 40, "layout": request.param})
    student = other_student(folder / "student")
    aligned(cache, student)
    return cache, student


def opened(cache: Path, student: Path) -> tuple[Cache, CacheAlignment]:
    found = Cache.open(cache)
    alignment = alignment_for(found, load_tokenizer(str(student)), student="student")
    assert alignment is not None
    return found, alignment


def rows_of(cache: Path, student: Path) -> list[tuple[Any, Any]]:
    found, alignment = opened(cache, student)
    pairs = []
    for split in SPLITS:
        for index in range(found.rows_of(split)):
            stored = found.read_row(split, index)
            pairs.append((stored, alignment.aligned_row(split, index, stored)))
    return pairs


def pieces(tokenizer: Any, ids: Any) -> list[bytes]:
    """The bytes of byte-level tokens, by GPT-2's alphabet; special tokens stand for none."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}
    specials = set(tokenizer.all_special_ids)
    texts = tokenizer.convert_ids_to_tokens([int(token) for token in ids])
    return [
        b"" if token in specials else bytes(alphabet[char] for char in text)
        for token, text in zip(ids, texts, strict=True)
    ]


def test_chunks_hold_every_token_once_and_their_bytes_are_the_text(made: tuple[Path, Path]) -> None:
    cache, student = made
    tokenizers = teacher_tokenizer(Cache.open(cache)), load_tokenizer(str(student))
    for stored, joined in rows_of(cache, student):
        sides = [pieces(tokenizer, row.input_ids_S) for tokenizer, row in
                 zip(tokenizers, (stored.row, joined.row), strict=True)]  # fmt: skip
        text = "".join(segment.text for segment in stored.row.segments).encode()
        taken, spelled = [0, 0], [b"", b""]
        for *counts, is_aligned in zip(
            *(joined.targets[name].tolist() for name in ("teacher_counts", "student_counts", "aligned")), strict=True
        ):
            chunk = [b"".join(side[start : start + n]) for side, start, n in zip(sides, taken, counts, strict=True)]
            taken = [start + n for start, n in zip(taken, counts, strict=True)]
            spelled = [before + part for before, part in zip(spelled, chunk, strict=True)]
            assert chunk[0].strip() == chunk[1].strip() or not is_aligned  # windows lose white space at their edges
        assert taken == [stored.row.length, joined.row.length]
        assert [part.strip() for part in spelled] == [text.strip()] * 2 or b" " in text
        assert int(joined.targets["token_bytes"].sum()) == len(text)


def test_the_student_learns_what_the_teacher_was_to_predict(made: tuple[Path, Path]) -> None:
    cache, student = made
    tokenizer, teacher = load_tokenizer(str(student)), teacher_tokenizer(Cache.open(cache))
    teachers = pieces(teacher, range(len(teacher)))
    for stored, joined in rows_of(cache, student):
        assert joined.row.held_out == stored.row.held_out
        assert [segment.source_id for segment in joined.row.segments] == [
            each.source_id for each in stored.row.segments
        ]
        ends = np.cumsum(joined.targets["token_bytes"])
        starts = [*(segment.start for segment in joined.row.segments), joined.row.length]
        for segment, start, stop in zip(stored.row.segments, starts[:-1], starts[1:], strict=True):
            mask_S = joined.row.target_mask_S[start:stop]
            assert not mask_S[-1] and (np.diff(mask_S[:-1].astype(int)) >= 0).all()  # all, once the first is read
            first = len(teachers[stored.row.input_ids_S[segment.start]])
            before = int(ends[start - 1]) if start else 0
            skipped = ends[start + 1 : stop][~mask_S[:-1]].max(initial=before)
            assert int(skipped) - before <= max(first, 4)  # a window may begin inside a character
            ids = joined.row.input_ids_S[start:stop]
            assert (ids[-1] == tokenizer.eos_token_id) == (ends[stop - 1] == ends[stop - 2])
            assert segment.text is not None


def test_the_end_of_a_text_is_a_chunk(made: tuple[Path, Path]) -> None:
    cache, student = made
    eos = load_tokenizer(str(student)).eos_token_id
    seen = 0
    for _, joined in rows_of(cache, student):
        if joined.row.input_ids_S[-1] == eos:
            last = [joined.targets[name][-1] for name in ("teacher_counts", "student_counts", "aligned")]
            assert last == [1, 1, 1]
            seen += 1
    assert seen


def test_equal_shards_give_equal_files_and_a_killed_job_resumes(made: tuple[Path, Path], tmp_path: Path) -> None:
    cache, student = made
    whole = {path.name: path.read_bytes() for path in (cache / "alignments").rglob("*") if path.is_file()}
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    shutil.rmtree(copy / "alignments")
    found = Cache.open(copy)
    plan = make_plan(found, str(student))
    align_shard(plan, 1)
    (copy / plan.within / ".part-00000.arrow.tmp").write_bytes(b"half")
    with pytest.raises(JobFailed, match="shards have no alignment"):
        commit(plan, found)
    assert verify(copy)  # nobody takes it for a finished one
    again = make_plan(found, str(student))
    assert again.pending() == [unit for unit in range(plan.units) if unit != 1]
    for unit in again.pending():
        align_shard(again, unit)
    commit(again, found)
    assert {path.name: path.read_bytes() for path in (copy / "alignments").rglob("*") if path.is_file()} == whole
    assert verify(copy) == []


def test_an_alignment_is_covered_by_digests(made: tuple[Path, Path], tmp_path: Path) -> None:
    cache, student = made
    for path in sorted((cache / "alignments").rglob("*")):
        if not path.is_file():
            continue
        copy = tmp_path / path.name
        shutil.copytree(cache, copy)
        changed = copy / path.relative_to(cache)
        data = bytearray(changed.read_bytes())
        data[len(data) // 2] ^= 1
        changed.write_bytes(bytes(data))
        assert [problem.file for problem in verify(copy)], path
        changed.unlink()
        assert [problem.file for problem in verify(copy)], path
    found, _ = opened(cache, student)
    damaged = tmp_path / "read"
    shutil.copytree(cache, damaged)
    part = next((damaged / "alignments").rglob("part-00000-*.arrow"))
    part.write_bytes(part.read_bytes()[:-1] + b"\x00")
    copied, alignment = opened(damaged, student)
    with pytest.raises(CacheDamaged, match="part-00000"):
        alignment.aligned_row("train", 0, copied.read_row("train", 0))
    assert found.rows_of("train")


def test_a_foreign_alignment_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    cache, student = made
    other = tiny_cache(tmp_path, texts=sentences(33, seed=5), sequence={"length": 40})
    shutil.copytree(cache / "alignments", other / "alignments")
    same = Cache.open(other).manifest.settings_fingerprint == Cache.open(cache).manifest.settings_fingerprint
    reason = "its rows are not those of the cache" if same else "another cache"
    with pytest.raises(CacheDamaged, match=reason):
        opened(other, student)
    assert any(reason in problem.reason for problem in verify(other))
    longer = tiny_cache(tmp_path / "longer", texts=sentences(33, seed=5), sequence={"length": 44})
    shutil.copytree(cache / "alignments", longer / "alignments")
    with pytest.raises(CacheDamaged, match="another cache"):
        opened(longer, student)


def _edited(folder: Path, change: Any) -> None:
    """Change alignment.json and give it the right digest, as somebody with bad intentions would."""
    from teachercache.cache.files.digests import fingerprint_of

    path = next(folder.rglob("alignment.json"))
    data = json.loads(path.read_text())
    data.pop("digest")
    change(data)
    body = {key: value for key, value in data.items() if key != "format"}
    path.write_text(json.dumps({**data, "digest": fingerprint_of(body)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["index"][0].update(file="../../etc/passwd"), "outside"),
        (lambda data: data["index"][0].update(file="manifest.json"), "manifest.json"),
        (lambda data: data["parts"].update(rows=10**9), "totals"),
        (lambda data: data["tokenizer"].update(vocabulary_size=2**40), "vocabulary_size"),
        (lambda data: data["tokenizer"].update(pad_id=10**6), "pad_id"),
        (lambda data: data.update(sequence_length=2**40), "sequence_length"),
        (lambda data: data["vocabulary"].update(file="manifest.json"), "lists no"),
        (lambda data: data.update(format_version=9), "format version 9"),
    ],
)
def test_what_an_alignment_claims_is_checked(
    made: tuple[Path, Path], tmp_path: Path, change: Any, message: str
) -> None:
    cache, student = made
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    _edited(copy, change)
    with pytest.raises((CacheDamaged, CacheError), match=message) as caught:
        opened(copy, student)[1].vocabulary  # noqa: B018 - read
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["alignments", "its folder"])
def test_a_link_does_not_lead_what_is_written_out_of_the_cache(
    made: tuple[Path, Path], tmp_path: Path, where: str
) -> None:
    cache, student = made
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    [own] = (folder / "alignments").iterdir()
    shutil.rmtree(own if where == "its folder" else own.parent)
    (tmp_path / "outside").mkdir()
    (own if where == "its folder" else own.parent).symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match="is a link, which would lead"):
        make_plan(Cache.open(folder), str(student))
    assert not list((tmp_path / "outside").iterdir())


def test_users_mistakes_are_one_line_before_any_work(tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path / "a", texts=TEXTS)
    student = other_student(tmp_path / "student")
    with pytest.raises(CacheError, match="the teacher's own tokenizer"):
        make_plan(Cache.open(cache), str(tmp_path / "a" / "teacher"))
    with pytest.raises(CacheError, match="teachercache align"):
        opened(cache, student)
    without = tiny_cache(tmp_path / "b", texts=TEXTS, corpus={"store_text": False})
    with pytest.raises(CacheError, match="store_text"):
        make_plan(Cache.open(without), str(student))
    with pytest.raises(ModelError):
        make_plan(Cache.open(cache), str(tmp_path / "nowhere"))
    assert not (cache / "alignments").exists() and not (without / "alignments").exists()


def test_a_tokenizer_that_does_not_give_text_back_is_refused(tmp_path: Path) -> None:
    from tokenizers import Regex, normalizers

    tokenizer = other_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]{2,}"), "")  # it reads no text
    cache = tiny_cache(tmp_path, texts=TEXTS)
    student = other_student(tmp_path / "student", tokenizer=tokenizer)
    with pytest.raises(CacheError, match="none of the .* rows could be aligned"):
        aligned(cache, student)


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
    "{% else %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def test_conversations_are_aligned_by_what_was_said(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": f"the cat {n}"}, {"role": "assistant", "content": "sat on a mat, café 🙂"},
         {"role": "user", "content": "and then"}, {"role": "assistant", "content": "seven quick foxes ran"}]
        for n in range(8)
    ]  # fmt: skip
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    teacher = tiny_teacher(tmp_path / "teacher", chat_template=CHATML)
    cache = tiny_cache(
        tmp_path, teacher=teacher, texts=["x"], sequence={"length": 200},
        corpus={"source": str(corpus), "text_field": "text", "messages_field": "messages", "held_out": 0.2},
    )  # fmt: skip
    student = other_student(tmp_path / "student", tokenizer=other_tokenizer(chat_template=BRACKETS))
    aligned(cache, student)
    tokenizer = load_tokenizer(str(student))
    for _, joined in rows_of(cache, student):
        text = tokenizer.decode(joined.row.input_ids_S)
        assert text.startswith("[user] the cat") and "<|user|>" not in text
        learned = tokenizer.decode(joined.row.input_ids_S[1:][joined.row.target_mask_S[:-1]])
        assert learned.replace("</s>", "").count("sat on a mat") == 1 and "[user]" not in learned
        assert learned.count("</s>") == 2  # the end of a turn is something to learn
        counts = joined.targets["aligned"] > 0
        assert counts.any() and not counts.all()
    plain = other_student(tmp_path / "plain")
    with pytest.raises(ModelError, match="no chat template"):
        make_plan(Cache.open(cache), str(plain))


STRICT = (  # as Llama 2, Mistral and Gemma have it
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] | trim + '</s>' }}{% endfor %}"
)
DROPS = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)


def chats(folder: Path, *, length: int, layout: str = "documents") -> Path:
    said = sentences(24, seed=3, words=12)
    corpus = folder / "chats.jsonl"
    rows = [
        [{"role": "system", "content": "hi"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": said[n]},
         {"role": "user", "content": said[n + 1]}, {"role": "assistant", "content": said[n + 2]}]
        for n in range(20)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    corpus.write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows))
    teacher = tiny_teacher(folder / "teacher", chat_template=CHATML)
    return tiny_cache(
        folder, teacher=teacher, texts=["x"], sequence={"length": length, "layout": layout},
        corpus={"source": str(corpus), "text_field": "text", "messages_field": "messages", "held_out": 0.2},
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("template", [BRACKETS, STRICT, DROPS], ids=["brackets", "strict", "drops"])
def test_windows_of_conversations_keep_what_was_said(tmp_path: Path, template: str, layout: str) -> None:
    cache = chats(tmp_path / "c", length=20, layout=layout)
    student = other_student(tmp_path / "student", tokenizer=other_tokenizer(chat_template=template))
    aligned(cache, student)
    pairs = rows_of(cache, student)
    _, alignment = opened(cache, student)
    assert sum(alignment.manifest.unaligned.values()) <= 0.05 * len(pairs)
    totals = alignment.manifest.totals  # markup is text, but nothing that could be aligned
    assert 0.2 < totals["aligned_bytes"] / totals["bytes"] < 0.9
    taught = sum(int(stored.row.positions) for stored, _ in pairs)
    learned = sum(int(joined.targets["token_bytes"][1:][joined.row.target_mask_S[:-1]].sum()) for _, joined in pairs)
    tokenizer = teacher_tokenizer(Cache.open(cache))
    spelled = [pieces(tokenizer, stored.row.labels_N()) for stored, _ in pairs]
    assert taught and learned >= 0.9 * sum(len(part) for row in spelled for part in row)


def test_regions_are_of_the_same_speaker() -> None:
    from teachercache.corpus.chat import ChatRenderer
    from teachercache.precompute.align.reading import Read, Reader
    from teachercache.tokens.rows import Content, Segment

    text = "<|system|>\nhi<eos>\n<|user|>\nhi<eos>\n<|assistant|>\n seven<eos>\n"
    contents = tuple(
        Content(role, text.index(word, start), text.index(word, start) + len(word))
        for role, word, start in (("system", "hi", 0), ("user", "hi", 20), ("assistant", " seven", 0))
    )
    read = Reader(ChatRenderer(other_tokenizer(chat_template=DROPS)))(
        Segment("0" * 32, 0, 0, len(text), 0, text, contents)
    )
    assert isinstance(read, Read) and "system" not in read.text
    found = [(text[each.teacher_start : each.teacher_end], each.teacher_start) for each in read.regions]
    assert found == [("hi", contents[1].start), ("seven", contents[2].start + 1)]


def test_two_templates_are_two_alignments(tmp_path: Path) -> None:
    cache = chats(tmp_path / "c", length=200)
    one, two = (other_tokenizer(chat_template=template) for template in (BRACKETS, STRICT))
    folder = aligned(cache, other_student(tmp_path / "one", tokenizer=one))
    with pytest.raises(CacheError, match="has no alignment"):
        alignment_for(Cache.open(cache), two, student="two")
    assert aligned(cache, other_student(tmp_path / "two", tokenizer=two)) != folder
    found = [alignment_for(Cache.open(cache), each, student="it") for each in (one, two)]
    assert (
        found[0] is not None and found[1] is not None and found[0].manifest.fingerprint != found[1].manifest.fingerprint
    )
    assert verify(cache) == []


def test_the_end_of_a_turn_is_the_token_that_the_template_writes(tmp_path: Path) -> None:
    """Not EOS, where a template ends turns otherwise: what the teacher says there must not teach two things."""
    cache = chats(tmp_path / "c", length=200)
    tokenizer = other_tokenizer(chat_template=BRACKETS.replace("</s>", "<end>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    student = other_student(tmp_path / "student", tokenizer=tokenizer)
    aligned(cache, student)
    teacher = teacher_tokenizer(Cache.open(cache))
    end = tokenizer.convert_tokens_to_ids("<end>")
    found = Cache.open(cache)
    alignment = alignment_for(found, tokenizer, student="student")
    assert alignment is not None and alignment.vocabulary.first_Vt[teacher.eos_token_id] == end
    stored = found.read_row("train", 0)
    joined = alignment.aligned_row("train", 0, stored)
    assert end in joined.row.input_ids_S[1:][joined.row.target_mask_S[:-1]]


def test_a_vocabulary_map_of_another_size_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    from teachercache.cache.files.entries import file_info
    from teachercache.tokens.vocabulary_map import VocabularyMap

    cache, student = made
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    path = next(copy.rglob("vocabulary.safetensors"))
    whole = VocabularyMap.load(path)
    emitted_Vs = np.zeros_like(whole.emitted_Vs)
    emitted_Vs[whole.first_Vt[:-5][whole.first_Vt[:-5] >= 0]] = True
    VocabularyMap(whole.first_Vt[:-5], whole.exact_Vt[:-5], emitted_Vs, whole.identical, whole.coverage).save(path)

    def renew(data: dict[str, Any]) -> None:
        info = vars(file_info(copy, path))
        data["files"] = [info if each["file"] == info["file"] else each for each in data["files"]]

    _edited(copy, renew)
    with pytest.raises(CacheDamaged, match="other vocabularies"):
        opened(copy, student)[1].vocabulary  # noqa: B018 - read


def test_the_job_runs_under_ray_with_precompute_and_finds_itself_finished(tmp_path: Path) -> None:
    student = other_student(tmp_path / "student")
    console = Console(stderr=True, quiet=True)
    recipe = tiny_recipe(tmp_path, texts=TEXTS, align=[str(student)])
    made = run_precompute(recipe, console=console)
    cache, (result,) = Path(made["cache"]), made["alignments"]
    assert result["rows"] == len(list(rows_of(cache, student))) and result["rows_without_chunks"] == 0
    assert result["aligned_fraction"] == 1.0 and 0 < result["vocabulary_coverage"] <= 1 and result["chunks"] > 100
    assert result["teacher_tokens"] > result["chunks"] and verify(cache) == []
    again = run_align(cache, student=str(student), console=console)
    with pytest.raises(RecipeError, match="store_text"):
        run_precompute(tiny_recipe(tmp_path, align=[str(student)], corpus={"store_text": False}), console=console)
    assert again["working_seconds"] == 0.0 and again["chunks"] == result["chunks"]


def test_windows_of_long_documents_are_aligned_one_by_one(tmp_path: Path) -> None:
    texts = [" ".join(sentences(8, seed=seed)) for seed in range(6)]
    corpus = write_corpus(tmp_path / "long.jsonl", texts)
    cache = tiny_cache(tmp_path / "c", corpus={"source": str(corpus), "held_out": 0.2}, sequence={"length": 32})
    student = other_student(tmp_path / "student")
    aligned(cache, student)
    bytes_of: dict[str, int] = {}
    for stored, joined in rows_of(cache, student):
        learned = joined.targets["token_bytes"][1:][joined.row.target_mask_S[:-1]]
        source = stored.row.segments[0].source_id
        bytes_of[source] = bytes_of.get(source, 0) + int(learned.sum())
    for total, text in zip(sorted(bytes_of.values()), sorted(map(len, texts)), strict=True):
        assert 0.9 * text < total <= 1.1 * text  # all but first tokens, some of them at both edges of a window
