import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from teachercache.config import CorpusConfig
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError

TEXTS = [f"document {number}" for number in range(40)]


def texts(source, **options):
    config = CorpusConfig(source=str(source), **options)
    return [row[config.text_field] for row in read_rows(config)]


def refused(source, **options):
    with pytest.raises(CorpusError) as caught:
        list(read_rows(CorpusConfig(source=str(source), **options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, values=TEXTS, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: value, "n": 1}) + "\n" for value in values))
    return path


def write_parquet(path, values=TEXTS, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({field: values, "n": list(range(len(values)))}), path, row_group_size=7)
    return path


def write_text(folder, values=TEXTS):
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        (folder / f"{number:03}.txt").write_text(value)
    return folder


WRITERS = {
    "parquet": lambda folder: write_parquet(folder / "rows.parquet"),
    "jsonl": lambda folder: write_jsonl(folder / "rows.jsonl"),
    "text": lambda folder: write_text(folder / "texts"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_yields_its_rows_in_order(tmp_path, kind):
    source = WRITERS[kind](tmp_path)
    assert texts(source) == TEXTS
    assert texts(source, format=kind, streaming=True) == TEXTS
    assert texts(source, limit=3) == TEXTS[:3]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:10%]", TEXTS[:4]),
        ("train[90%:]", TEXTS[36:]),
        ("train[5:23]", TEXTS[5:23]),
        ("train[-2:]", TEXTS[-2:]),
        ("train[:2]+train[30:32]", TEXTS[:2] + TEXTS[30:32]),
        ("train[:1000]", TEXTS),
    ],
)
def test_slices_mean_what_they_mean_to_datasets(tmp_path, kind, split, expected):
    assert texts(WRITERS[kind](tmp_path), split=split) == expected


def test_slices_run_across_files(tmp_path):
    for part in range(4):
        write_parquet(tmp_path / f"{part}.parquet", TEXTS[part * 10 : part * 10 + 10])
    assert texts(tmp_path, split="train[8:33]") == TEXTS[8:33]
    assert texts(tmp_path / "[12].parquet") == TEXTS[10:30]
    assert texts(tmp_path / "**" / "*.parquet") == TEXTS


@pytest.mark.parametrize("compress", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_json_lines(tmp_path, compress):
    suffix, function = compress
    plain = write_jsonl(tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / f"packed.jsonl{suffix}").write_bytes(function(plain))
    assert texts(tmp_path / f"packed.jsonl{suffix}") == TEXTS


@pytest.mark.parametrize("compress", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_truncated_file_is_not_taken_for_a_short_one(tmp_path, compress):
    suffix, function = compress
    packed = function(write_jsonl(tmp_path / "rows.jsonl", [str(n**7 % 1000003) for n in range(5000)]).read_bytes())
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    assert "damaged: Truncated" in refused(tmp_path / f"cut.jsonl{suffix}")


def test_messages_come_from_json_lines_and_parquet(tmp_path):
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    write_jsonl(tmp_path / "chat.jsonl", chats, field="messages")
    write_parquet(tmp_path / "chat.parquet", chats, field="messages")
    for name in ("chat.jsonl", "chat.parquet"):
        config = CorpusConfig(source=str(tmp_path / name), messages_field="messages")
        assert [row["messages"] for row in read_rows(config)] == chats


def test_python_docs_need_nothing_but_python():
    rows = texts("python-docs")
    assert len(rows) > 40 and rows == texts("python-docs", format="python-docs")
    assert texts("python-docs", split="train[:10%]") == rows[: round(len(rows) / 10)]
    assert texts("python-docs", text_field="body") == rows


def test_python_docs_do_not_repeat_each_other():
    """Else a held-out section would be trained on inside its chapter."""
    rows = texts("python-docs")
    sentence = "Calling an asynchronous generator"  # stands in several topics of CPython
    assert sum(sentence in text for text in rows) <= 1
    lines = [{line for line in text.splitlines() if len(line) > 65} for text in rows]
    for index, mine in enumerate(lines):
        others = set().union(*lines[:index], *lines[index + 1 :])
        assert len(mine) < 8 or len(mine & others) <= 0.25 * len(mine)


def test_a_bad_json_line_is_handed_on_with_its_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\nnot json\n["list"]\n{"text": "\xff"}\n{"text": "b"}\n')
    rows = list(read_rows(CorpusConfig(source=str(path))))
    assert [row.get("text") for row in rows] == ["a", None, None, None, "b"]
    reasons = [row["_unreadable"] for row in rows[1:4]]
    assert "line 3: not JSON" in reasons[0] and rows[1]["_raw"] == "not json"
    assert "line 4: not a JSON object but list" in reasons[1] and "line 5" in reasons[2]


def test_undecodable_text_is_handed_on(tmp_path):
    write_text(tmp_path / "texts", ["fine"])
    (tmp_path / "texts" / "bad.txt").write_bytes(b"caf\xe9")
    rows = list(read_rows(CorpusConfig(source=str(tmp_path / "texts"))))
    assert rows[0] == {"text": "fine"}
    assert "bad.txt: not UTF-8" in rows[1]["_unreadable"] and rows[1]["_raw"] == r"caf\xe9"


def test_undecodable_parquet_values_are_handed_on(tmp_path):
    values = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    rows = list(read_rows(CorpusConfig(source=str(tmp_path / "rows.parquet"))))
    assert [row.get("text") for row in rows] == ["one", None, "three"]
    assert "not UTF-8" in rows[1]["_unreadable"] and rows[1]["_raw"] == r"caf\xe9"


def test_folders_skip_hidden_files_and_a_readme_beside_data(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "_SUCCESS").write_text("")
    assert texts(tmp_path) == TEXTS


def test_a_readme_beside_texts_is_no_document(tmp_path):
    folder = write_text(tmp_path / "texts")
    (folder / "README.md").write_text("# about")
    assert texts(folder) == texts(folder, format="text") == texts(folder / "*") == TEXTS
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("README.md", "more.md"):
        (pages / name).write_text(name)
    assert texts(pages) == ["README.md", "more.md"]


def test_a_folder_of_several_suffixes_is_refused_until_the_recipe_says_which(tmp_path):
    folder = write_text(tmp_path, ["one"])
    (folder / "notes.md").write_text("notes")
    message = refused(folder)
    assert ".md and .txt" in message and "corpus.format (text)" in message
    assert texts(folder, format="text") == ["one", "notes"]
    assert texts(folder / "*.txt") == ["one"]


def test_what_is_missing_or_unclear_is_one_line_with_a_remedy(tmp_path):
    write_jsonl(tmp_path / "mixed" / "a.jsonl")
    write_parquet(tmp_path / "mixed" / "a.parquet")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.xyz").write_text("?")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "array.json").write_text('[\n{"text": "a"}]')
    (tmp_path / "bad.jsonl").write_text("no\nno\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    assert "does not exist" in refused(tmp_path / "nowhere.jsonl")
    assert "does not exist" in refused(tmp_path / "*.parq")
    assert "does not exist" in refused("./nowhere", format="parquet")
    assert "corpus.format" in refused(tmp_path / "mixed")
    assert "is an empty folder" in refused(tmp_path / "nothing")
    assert "no file with a known suffix" in refused(tmp_path / "odd")
    assert "holds no rows" in refused(tmp_path / "empty.jsonl")
    assert "jq" in refused(tmp_path / "array.json")
    assert "none of the first 2 rows" in refused(tmp_path / "bad.jsonl")
    assert "not readable Parquet" in refused(tmp_path / "bad.parquet")
    assert "damaged" in refused(tmp_path / "bad.jsonl.gz")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_unknown_field_is_answered_with_the_fields_there_are(tmp_path, kind):
    message = refused(WRITERS[kind](tmp_path), text_field="content")
    assert "no field `content`" in message and "n, text" in message and "corpus.text_field" in message


@pytest.mark.parametrize("split", ["test", "train[:10%", "train[x:y]"])
def test_an_impossible_split_is_answered_with_the_splits_there_are(tmp_path, split):
    message = refused(write_jsonl(tmp_path / "rows.jsonl"), split=split)
    assert repr(split) in message and "splits here: train" in message


def test_a_damaged_parquet_page_names_the_file(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet")
    data = bytearray(path.read_bytes())
    data[8:120] = bytes(112)
    path.write_bytes(data)
    assert "rows.parquet" in refused(path)


# --- through `datasets` ---


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo")
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", TEXTS)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ["held", "out"])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_split_names_is_read_by_datasets(dataset_folder, streaming):
    assert texts(dataset_folder, streaming=streaming) == TEXTS
    assert texts(dataset_folder, streaming=streaming, split="test") == ["held", "out"]
    assert texts(dataset_folder, streaming=streaming, limit=5) == TEXTS[:5]
    assert "n, text" in refused(dataset_folder, streaming=streaming, text_field="body")


def test_slices_and_errors_of_datasets(dataset_folder):
    assert texts(dataset_folder, split="train[:10%]") == TEXTS[:4]
    assert "corpus.limit" in refused(dataset_folder, split="train[:10%]", streaming=True)
    assert "validation" in refused(dataset_folder, split="validation")
    assert "cannot be loaded" in refused(dataset_folder, name="other-configuration")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_through_datasets(tmp_path, streaming):
    write_jsonl(tmp_path / "rows.jsonl")
    write_parquet(tmp_path / "rows.parquet")
    write_text(tmp_path / "texts", ["two\nlines", "other"])
    options = {"format": "datasets", "streaming": streaming}
    assert texts(tmp_path / "rows.jsonl", **options) == TEXTS
    assert texts(tmp_path / "rows.parquet", **options) == TEXTS
    assert texts(tmp_path / "rows*.parquet", **options) == TEXTS
    assert texts(tmp_path / "texts" / "*.txt", **options) == ["two\nlines", "other"]
    assert texts((tmp_path / "rows.jsonl").as_uri(), streaming=streaming) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_json_through_datasets_names_the_reader_that_quarantines(tmp_path, streaming):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\nbad\n')
    assert "corpus.format: jsonl" in refused(tmp_path / "rows.jsonl", format="datasets", streaming=streaming)


def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": TEXTS, "n": list(range(40))})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1, 2])}).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "one") == TEXTS
    assert texts(tmp_path / "one", split="train[-3:]", streaming=True) == TEXTS[-3:]
    assert texts(tmp_path / "several", split="test") == TEXTS[1:3]
    assert texts(tmp_path / "several", split="train[:5%]+test") == TEXTS[:2] + TEXTS[1:3]
    assert "splits here: test, train" in refused(tmp_path / "several", split="validation")
    assert "n, text" in refused(tmp_path / "one", text_field="body")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_out_of_reach_is_one_line(streaming):
    program = (
        "from teachercache.config import CorpusConfig\nfrom teachercache.corpus.readers import read_rows\n"
        "from teachercache.errors import CorpusError\n"
        f"config = CorpusConfig(source='no-such-user/no-such-dataset', streaming={streaming})\n"
        "try:\n    read_rows(config)\nexcept CorpusError as error:\n    print(error)\n"
    )
    # a process of its own: the Hub client reads this switch when it is imported
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    message = done.stdout.strip()
    assert message.startswith("dataset no-such-user/no-such-dataset cannot be loaded") and "\n" not in message
    assert "local file or folder" in message


def test_readers_import_neither_datasets_nor_torch():
    program = (
        "import sys, teachercache.corpus.readers, teachercache.corpus.documents, teachercache.corpus.sequences\n"
        "print([name for name in ('datasets', 'torch', 'transformers', 'ray') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
