"""The `teachercache` command. Each subcommand parses, builds its config, calls one function and prints what it returns.

Exit status: 0, 1 (a check failed, a job could not be completed), 2 (the user's mistake). Heavy libraries are imported inside
the commands: `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from teachercache.config import load_recipe
from teachercache.console import run_command
from teachercache.tables import cache_table, fidelity_table, row_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Knowledge distillation of language models from an offline cache of teacher outputs.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe; complete ones are in jobs/recipes/")]
CacheLocation = Annotated[str, typer.Argument(metavar="CACHE", help="a folder, or a URL such as s3://BUCKET/PREFIX")]
Overrides = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY.PATH=VALUE", help="override a recipe's value")
]
WHERE = "e.g. \"split == 'train' and positions >= 32\"; docs/guides/growing.md says what a row has"
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, progress on stderr")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where the cache, the student and the recipe go")] = Path("runs/quickstart"),
    compare: Annotated[
        bool, typer.Option("--compare", help="also train the same student without the teacher, and show it beside")
    ] = False,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Teacher → cache → student → table, on a model and a text that install from a package index."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.quickstart import run_quickstart

        return run_quickstart(out, compare=compare, overrides=overrides, console=console)

    def show(result: dict[str, Any]) -> Any:
        from rich.console import Group

        from teachercache.evaluation import render
        from teachercache.quickstart import next_commands, roles_of

        return Group(render({role: result[role] for role in roles_of(result)}), next_commands(result))

    raise typer.Exit(run_command(work, as_json=as_json, show=show))


@app.command()
def precompute(
    recipe: RecipePath,
    limit: Annotated[int | None, typer.Option(min=1, help="read at most so many rows of the corpus")] = None,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Run a teacher over a corpus and store what a student can learn from. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.capture.job import run_precompute

        extra = [f"corpus.limit={limit}"] if limit else []
        return run_precompute(load_recipe(recipe, [*overrides, *extra]), console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def estimate(
    recipe: RecipePath,
    seconds: Annotated[float, typer.Option(min=1, help="how long the teacher reads a sample, about")] = 30,
    device: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="also the hours on such accelerators, by their data sheet: H100, L40S …"),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="how many of them; default: 1")] = None,
    price_per_gb_month: Annotated[float, typer.Option(min=0, help="of the store that holds the cache")] = 0.023,
    student_runs: Annotated[
        int | None, typer.Option(min=1, help="also what so many students take, from a cache and from a live teacher")
    ] = None,
    teacher_changes: Annotated[
        int,
        typer.Option(min=0, help="how often the teacher changes between these runs, so that the cache is made anew"),
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="as of `precompute`: at most so many rows of the corpus")
    ] = None,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Say what `precompute` will take, from a timed sample: bytes, hours, store cost, and when a cache pays. Writes nothing."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.estimate.job import Question, run_estimate

        extra = [f"corpus.limit={limit}"] if limit else []
        question = Question(
            seconds=seconds, device=device, devices=devices, price_per_gb_month=price_per_gb_month,
            student_runs=student_runs, teacher_changes=teacher_changes,
        )  # fmt: skip
        return run_estimate(load_recipe(recipe, [*overrides, *extra]), question, console=console)

    def show(result: dict[str, Any]) -> Any:
        from teachercache.precompute.estimate.rendering import estimate_table

        return estimate_table(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))


@app.command()
def align(
    cache: CacheLocation,
    student: Annotated[
        str, typer.Option(metavar="ID", help="a model whose tokenizer the student has: hub id or folder")
    ],
    revision: Annotated[str | None, typer.Option(help="hub commit, tag or branch")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local one")] = None,
    as_json: Json = False,
) -> None:
    """Make a cache fit for a student with another tokenizer, on CPUs, without the teacher. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.align.job import run_align

        return run_align(cache, student=student, revision=revision, address=address, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command("init-student")
def init_student(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder, .gguf or package://NAME/FILE")
    ],
    out: Annotated[Path, typer.Option(help="folder of the new student")],
    layers: Annotated[str, typer.Option(help="0,5,10 or every:3 or keep:10 or first:8")] = "every:3",
    tokenizer: Annotated[
        str | None, typer.Option(help="id or folder of another tokenizer: embeddings for it are made of the model's")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="hub commit, tag or branch")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Make a student from some of a model's own layers."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.training.initialise.init_student import init_student as make

        result = make(model, layers=layers, output=out, tokenizer=tokenizer, revision=revision, overwrite=overwrite)
        size = f"{len(result['layers'])} layers, {result['parameters']:,} parameters"
        console.print(Text.assemble(("made", "green"), f" a student of {size} → {out}"), soft_wrap=True)
        if tokenizer is not None:
            counts = result["embeddings"]
            how = f"{counts['copied']:,} copied, {counts['averaged']:,} averaged, {counts['mean']:,} from the mean"
            console.print(f"embeddings of {sum(counts.values()):,} tokens: {how}", soft_wrap=True)
        return result

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def train(recipe: RecipePath, overrides: Overrides = [], as_json: Json = False) -> None:
    """Train a student from a cache, alone or under `deepspeed` / `torchrun`. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.training.job.train import run_training

        return run_training(load_recipe(recipe, overrides), console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def sample(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(help="the new corpus, JSON lines")],
    student: Annotated[str | None, typer.Option(help="who writes; default: the recipe's trained student")] = None,
    rows: Annotated[int, typer.Option(min=1, help="at most so many samples")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="how much of a document the student is given")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens that it adds")] = 224,
    temperature: Annotated[float, typer.Option(help="of sampling; 1 is what the student would say")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="samples at a time")] = 16,
    seed: Annotated[int, typer.Option(help="draws other documents, and other samples")] = 0,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Let a student go on from beginnings of the recipe's corpus: a corpus of its own text, for another `precompute`."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.sampling.job import run_sampling

        return run_sampling(
            load_recipe(recipe, overrides), out=out, student=student, rows=rows, prompt_tokens=prompt_tokens,
            new_tokens=new_tokens, temperature=temperature, batch=batch, seed=seed, console=console,
        )  # fmt: skip

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def evaluate(
    recipe_or_run: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a recipe, or the run folder it made")],
    teacher: Annotated[
        str | None, typer.Option(help="where the teacher is here; default: as the cache names it")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="measure on at most so many held-out rows")] = None,
    cross_entropy: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="run folder of a student that learned without the teacher, to show it beside"),
    ] = None,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Compare teacher, student before and student after on held-out rows, each in a process of its own."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.evaluation import run_evaluation

        def progress(message: str) -> None:
            console.print(message, markup=False, soft_wrap=True)

        return run_evaluation(
            recipe_or_run,
            teacher=teacher,
            cross_entropy=cross_entropy,
            rows=rows,
            overrides=overrides,
            progress=progress,
        )

    def show(result: dict[str, Any]) -> Any:
        from teachercache.evaluation import render

        return render(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))


@app.command()
def fidelity(
    cache: CacheLocation,
    teacher: Annotated[
        str | None, typer.Option(help="where the teacher is here; default: as the cache names it")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="compare so many rows, spread over the cache")] = 32,
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "1,2,4",
    tail: Annotated[
        str | None, typer.Option(help="sketch, uniform or renormalise; default: the best the cache holds")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the teacher")
    ] = False,
    other_weights: Annotated[
        bool, typer.Option("--other-weights", help="compare with a teacher whose files are not those of the cache's")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the teacher again on some rows and compare what it says with what is stored."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import Cache
        from teachercache.evaluation.fidelity import parse_options, run_fidelity
        from teachercache.stream.beginnings import warnings_of

        options = parse_options(temperatures, tail)
        opened = Cache.open(cache)
        for line in warnings_of([opened]):
            console.print(line, markup=False, soft_wrap=True)
        console.print(f"running the teacher again on up to {rows} rows of {cache} …", markup=False, soft_wrap=True)
        options.update(trust_remote_code=trust_remote_code, other_weights=other_weights)
        return run_fidelity(opened, teacher=teacher, rows=rows, **options)

    raise typer.Exit(run_command(work, as_json=as_json, show=fidelity_table))


@app.command()
def inspect(
    cache: CacheLocation,
    row: Annotated[str | None, typer.Option(help="a row's id (or its beginning), or train:0, held-out:3")] = None,
    student: Annotated[str | None, typer.Option(help="with --row: which alignment, where there are several")] = None,
    as_json: Json = False,
) -> None:
    """Show what is inside a cache, or one row token by token."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import Cache
        from teachercache.cache.inspection import describe, describe_row

        opened = Cache.open(cache)
        return describe_row(opened, row, student=student) if row else describe(opened)

    raise typer.Exit(run_command(work, as_json=as_json, show=row_table if row else cache_table))


@app.command()
def merge(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE…", help="folders or URLs, two or more")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache")],
    as_json: Json = False,
) -> None:
    """Join caches of equal settings into a new one, each row once. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import merge as join

        return join(caches, to, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command("filter")
def filter_(
    cache: CacheLocation,
    where: Annotated[str, typer.Option(metavar="EXPR", help=WHERE)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache")],
    as_json: Json = False,
) -> None:
    """Make a cache of some rows of another one. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import filter_rows

        return filter_rows(cache, where, to, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def split(
    cache: CacheLocation,
    where: Annotated[str, typer.Option(metavar="EXPR", help=WHERE)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache of the rows that it holds of")],
    rest: Annotated[Path, typer.Option(metavar="FOLDER", help="the new cache of all others")],
    as_json: Json = False,
) -> None:
    """Part a cache in two: the rows that an expression holds of, and all others. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache.composition.compose import split as part

        return part(cache, where, to, rest, console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))


@app.command()
def verify(
    cache: CacheLocation,
    quick: Annotated[bool, typer.Option("--quick", help="sizes, schemas and counts only: no hashing")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="also read every row and check what it says; minutes a GB")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a cache against its manifest. Exit status 1: it is not whole."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import verify as check
        from teachercache.cache.storage.source import manifest_of

        problems = check(cache, quick=quick, deep=deep)
        result = {"ok": not problems, "cache": cache, "errors": [vars(problem) for problem in problems]}
        if not problems:
            audit = manifest_of(cache).audit
            result |= {"quarantined": audit.quarantined, "windows_quarantined": audit.windows_quarantined}
        return result

    def show(result: dict[str, Any]) -> Any:
        if result["ok"]:
            lost = result["windows_quarantined"]
            note = f"; {lost:,} windows of stored rows have no targets: quarantine/ says which, and why" if lost else ""
            return Text.assemble(("whole", "green"), f" {cache}{note}")
        lines = [Text.assemble((e["file"], "red"), f": {e['reason']}; {e['remedy']}") for e in result["errors"]]
        return Text("\n").join(lines)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script and of jobs/ (`arguments`: default, those of the process).

    With `--json`, arguments that make no sense are answered with a document too.
    """
    try:
        app(arguments)
    except SystemExit as end:
        explain = getattr(end.__context__, "format_message", None)  # a usage error: no command ran
        if explain is not None and "--json" in sys.argv:
            print(json.dumps({"error": explain(), "exit_status": end.code}))
        raise
