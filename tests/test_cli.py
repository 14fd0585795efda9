"""The commands as users meet them: `--json`, exit statuses, and one readable line for every mistake."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from teachercache import cli, config, errors
from teachercache.config import load_recipe
from teachercache.console import run_command
from teachercache.errors import RecipeError

from builders import part, sentences, tiny_cache, tiny_recipe, tiny_teacher

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "COLUMNS": "300"}
    return subprocess.run(
        [sys.executable, "-m", "teachercache", *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def run_here(capfd, monkeypatch):
    """The same in this process, which has imported the libraries."""
    monkeypatch.setenv("COLUMNS", "300")

    def run_it(*arguments: str | Path) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(each) for each in arguments])
        return subprocess.CompletedProcess(arguments, ended.value.code, *capfd.readouterr())

    return run_it


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cli"))


def write_recipe(folder: Path, **changes) -> Path:
    data = tiny_recipe(folder).model_dump(mode="json", exclude_none=True)
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def assert_one_readable_line(done: subprocess.CompletedProcess, *parts: str, status: int = 2) -> None:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for each in parts:
        assert each in line


def test_help_answers_at_once():
    start = time.perf_counter()
    done = run("--help")
    assert done.returncode == 0 and time.perf_counter() - start < 20  # a bound against importing torch by mistake
    for command in ("quickstart", "precompute", "init-student", "train", "evaluate", "inspect", "verify"):
        assert command in done.stdout
    code = "import sys, teachercache.cli; assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_json_is_one_document_and_progress_goes_to_stderr(cache):
    done = run("inspect", cache, "--json")
    assert json.loads(done.stdout)["positions"]["train"] > 0 and done.returncode == 0
    done = run("verify", cache, "--json")
    found = {"ok": True, "cache": str(cache), "errors": [], "quarantined": 0, "windows_quarantined": 0}
    found |= {"checked": "every byte", "lost_windows": []}
    assert json.loads(done.stdout) == found


def test_inspect_shows_a_cache_and_a_row_to_people(cache):
    assert "bytes/position" in run("inspect", cache).stdout
    assert "teacher's next tokens" in run("inspect", cache, "--row", "held-out:0").stdout


@pytest.fixture(scope="module")
def chat_tokens(tmp_path_factory) -> Path:
    """A cache whose tokenizer has tokens, and whose folder has a name, that look like rich's markup."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("markup") / "a [bold] :dog:"
    teacher = tiny_teacher(folder / "teacher", padded_vocabulary=2)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["[bold]", "[/INST]"])
    tokenizer.save_pretrained(teacher)
    return tiny_cache(folder, teacher=teacher, texts=[f"[bold] the cat sat [/INST] {n}" for n in range(8)])


def test_what_looks_like_markup_is_shown_as_it_is(chat_tokens, tmp_path):
    row = run("inspect", chat_tokens, "--row", "train:0")
    assert row.returncode == 0 and "'[/INST]'" in row.stdout and "'[bold]'" in row.stdout
    for command in ("inspect", "verify"):
        assert str(chat_tokens) in run(command, chat_tokens).stdout
    (chat_tokens / "[red].txt").write_text("not listed")
    broken = run("verify", chat_tokens)
    assert broken.returncode == 1 and "[red].txt: " in broken.stdout


def test_verify_exits_with_1_when_a_cache_is_not_whole(cache, tmp_path):
    import shutil

    broken = Path(shutil.copytree(cache, tmp_path / "broken"))
    part(broken, 0).unlink()
    done = run("verify", broken, "--json")
    assert done.returncode == 1
    [problem] = json.loads(done.stdout)["errors"]
    assert set(problem) == {"file", "reason", "remedy"}


def test_an_error_is_json_too(tmp_path):
    done = run("inspect", tmp_path / "nothing", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_status"] == 2


@pytest.mark.parametrize("arguments", [["verify", "--json"], ["precompute", "r.yaml", "--limit", "0", "--json"]])
def test_a_usage_error_is_json_too(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Usage:" in done.stderr
    document = json.loads(done.stdout)
    assert document["exit_status"] == 2 and document["error"]


def test_a_path_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    path = write_recipe(tmp_path, cache=str(tmp_path / "file" / "x"))
    done = run("precompute", path, "--json")
    assert_one_readable_line(done, str(tmp_path / "file"), "check the path")
    assert json.loads(done.stdout)["exit_status"] == 2


def finish(work, capfd, *, as_json: bool = True) -> tuple[int, str, str]:
    status = run_command(work, as_json=as_json, show=lambda _: None)
    return status, *capfd.readouterr()


def test_errors_of_the_system_name_their_path(tmp_path, capfd):
    status, out, err = finish(lambda _: {"text": (tmp_path / "none").read_text()}, capfd)
    assert status == 2 and "Traceback" not in err
    assert json.loads(out)["error"].startswith(f"{tmp_path / 'none'}: No such file or directory")


@pytest.mark.parametrize("error", [KeyError("lost"), OSError("a library's own")], ids=["bug", "no-filename"])
def test_anything_unexpected_keeps_its_traceback_and_is_json_too(error, capfd):
    def work(console):
        os.write(1, b"a library's chatter")
        raise error

    status, out, err = finish(work, capfd)
    assert status == 1 and "Traceback" in err
    assert json.loads(out) == {"error": f"unexpected {type(error).__name__}: {error}", "exit_status": 1}
    assert finish(work, capfd, as_json=False)[:2] == (1, "")


@pytest.mark.parametrize("command", ["precompute", "train", "evaluate"])
def test_a_missing_recipe(command, run_here):
    assert_one_readable_line(run_here(command, "nowhere.yaml"), "nowhere.yaml", "does not exist")


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    """As all of them are met; nothing but our line is in its stderr."""
    path = write_recipe(tmp_path, teacher={"model": "./missing-model"})
    done = run("precompute", path)
    assert_one_readable_line(done, "./missing-model", "does not exist")
    assert done.stdout == "" and "WARNING" not in done.stderr


def test_an_unknown_key_names_the_nearest_valid_one(tmp_path, run_here):
    path = write_recipe(tmp_path, precompute={"actorz": 2})
    assert_one_readable_line(run_here("precompute", path), "unknown key `precompute.actorz`", "did you mean `actors`?")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"corpus": {"source": "missing.jsonl"}}, ["missing.jsonl"]),
        ({"teacher": {"model": "./missing-model"}}, ["./missing-model", "does not exist"]),
        ({"teacher": {"model": "nobody/no-such-model"}}, ["nobody/no-such-model", "was not found"]),
        ({"targets": {"logits": {"kind": "top-k", "k": 10**6}}}, ["targets.logits.k is 1000000", "300 tokens"]),
    ],
)
def test_mistakes_in_a_precompute_recipe(tmp_path, changes, parts, run_here):
    assert_one_readable_line(run_here("precompute", write_recipe(tmp_path, **changes)), *parts)


def test_an_empty_corpus(tmp_path, run_here):
    path = write_recipe(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("")
    assert_one_readable_line(run_here("precompute", path), "empty")


def test_a_model_with_code_of_its_own_says_what_to_do(tmp_path, run_here):
    teacher = tiny_teacher(tmp_path / "remote")
    settings = json.loads((teacher / "config.json").read_text())
    settings |= {
        "model_type": "novel",
        "auto_map": {"AutoConfig": "code.Novel", "AutoModelForCausalLM": "code.NovelLM"},
    }
    (teacher / "config.json").write_text(json.dumps(settings))
    (teacher / "code.py").write_text("raise SystemExit('this code must not run')")
    path = write_recipe(tmp_path, teacher={"model": str(teacher)})
    assert_one_readable_line(run_here("precompute", path), "Python code of its own", "teacher.trust_remote_code: true")


def test_a_half_written_cache_is_not_trained_on(tmp_path, run_here):
    from teachercache.precompute.capture.plan import make_plan

    make_plan(tiny_recipe(tmp_path))
    path = write_recipe(tmp_path, student={"model": str(tmp_path / "teacher")}, train={"output": str(tmp_path / "run")})
    assert_one_readable_line(run_here("train", path), "half written (0 of 3 units are done)", "teachercache precompute")


def test_a_section_that_a_command_needs(tmp_path, run_here):
    assert_one_readable_line(run_here("train", write_recipe(tmp_path)), "no `student:` section")


# --------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_is_valid(path):
    load_recipe(path).require("teacher", "corpus", "student", "train")


def test_the_quickstart_recipe_is_the_one_in_the_package():
    link = ROOT / "jobs" / "recipes" / "quickstart.yaml"
    assert link.read_text() == (ROOT / "pipeline" / "teachercache" / "recipes" / "quickstart.yaml").read_text()


def test_overrides_reach_any_depth(tmp_path):
    path = write_recipe(tmp_path)
    recipe = load_recipe(
        path, ["targets.logits.k=4", "train={output: z}", "train.learning_rate=1e-3", "corpus.limit=7"]
    )
    assert recipe.targets.logits.k == 4 and recipe.train.learning_rate == 1e-3 and recipe.corpus.limit == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("just words", "must be a mapping"),
        ("teacher: {model: m}", "`cache` is missing"),
        ("cache: c\ntrain: {output: o, global_batch: 5, micro_batch: 2}", "multiple of micro_batch"),
        ("cache: c\ntargets: {logits: {kind: top-k, temperatures: [2, 4]}}", "must hold 1"),
        ("cache: c\ntargets: {logits: {kind: top-k, temperatures: [2, 1]}}", "must rise"),
        (
            "cache: c\ntargets: {logits: {temperatures: [1, 2]}}",
            "`targets.logits.temperatures` is of kind: top-k or kind: top-p",
        ),
        ("cache: c\ntargets: {logits: {kind: top-q}}", "targets.logits"),
        ("cache: c\ntargets: {logits: top-k}", "targets.logits"),
        ("cache: c\ncorpus: {source: s, held_out: 1.5}", "less than 1"),
        ("cache: c\nstream: {mix: [{cach: d}]}", "unknown key `stream.mix.0.cach`; did you mean `cache`?"),
        ("cache: c\nstream: {window: 3}\ntrain: {output: o}\nstream: {window: 4}", "`stream` is there twice"),
    ],
)
def test_recipes_that_make_no_sense(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["train", "=3", "cache.deep=1", "a.b=[1"])
def test_overrides_that_make_no_sense(tmp_path, override):
    with pytest.raises(RecipeError, match="override"):
        load_recipe(write_recipe(tmp_path), [override])


def test_public_modules_stay_importable():
    assert {"main", "app"} <= set(vars(cli)) and issubclass(errors.UserError, errors.TeachercacheError)
    assert config.Recipe.model_config["frozen"]


def test_windows_without_targets_are_told(tmp_path: Path) -> None:
    """One window of one document, whose other windows are stored: what is lost is in no count of documents."""
    import torch
    from transformers import LlamaModel

    from teachercache.precompute.capture.commit import commit
    from teachercache.precompute.capture.job import print_closing, summary
    from teachercache.precompute.capture.plan import make_plan
    from teachercache.precompute.capture.unit_tokens import tokenise_unit
    from teachercache.precompute.capture.units import compute_unit
    from teachercache.precompute.engine.timing import Timing
    from teachercache.teacher import Teacher

    class NoRoom(LlamaModel):
        def forward(self, input_ids=None, **inputs):
            if lost is not None and bool((input_ids == lost[: input_ids.shape[1]]).all(-1).any()):
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(input_ids=input_ids, **inputs)

    recipe = tiny_recipe(tmp_path, texts=sentences(12, words=120), sequence={"length": 24})
    plan, lost = make_plan(recipe), None
    teacher = Teacher.load(recipe.teacher, targets=plan.loaded_targets(), layout="documents", pad_id=0)
    model = teacher.backend.model
    body = NoRoom(model.config).eval()
    body.load_state_dict(model.model.state_dict())
    model.model = body
    for unit in plan.pending():
        tokenised, documents = tokenise_unit(plan, unit, sequence=recipe.sequence, store_text=True)
        if lost is None:
            longest = max(tokenised.rows, key=lambda row: row.length)
            lost, [window] = torch.from_numpy(longest.input_ids_S).long(), longest.segments
        compute_unit(teacher, plan, unit, tokenised, documents=documents, positions_per_batch=256)
    manifest = commit(plan)
    result = summary(recipe, manifest, Timing(), seconds=1.0)
    assert (result["quarantined"], result["windows_quarantined"]) == (0, 1)
    with (tmp_path / "said").open("w") as stream:
        print_closing(Console(file=stream, width=1000), result, manifest)
    assert ", 1 windows of other rows quarantined," in (tmp_path / "said").read_text()
    told = CliRunner().invoke(cli.app, ["verify", str(recipe.cache), "--json"])
    said = json.loads(told.stdout)
    assert said["windows_quarantined"] == 1 and told.exit_code == 0
    [named] = said["lost_windows"]
    assert "out of memory" in named.pop("reason")
    assert named == {key: getattr(window, key) for key in ("source_id", "occurrence", "byte_start", "byte_end")}
    shown = CliRunner().invoke(cli.app, ["verify", str(recipe.cache)])
    words = " ".join(shown.output.split())
    assert "1 windows of stored rows have no targets: quarantine/" in words
    assert f"bytes {window.byte_start}-{window.byte_end} of document {window.source_id}" in words
