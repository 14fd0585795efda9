"""Does a student that matches layers resemble its teacher more, and at what cost in loss? Against logits alone, same steps.

    python tests/bench/layer_quality.py WORK_FOLDER [--steps 2000] [--rows 2] [--arms …] [--packages NAME …]
        [--out FILE] [--json]

The quickstart's pair (8 of the teacher's 30 blocks) on the documentation of CPython's standard library: the help topics, and
the docstrings of its modules, 450,000 positions; with `--packages` also the docstrings of these (a work folder keeps to the
text that it was begun with). A twentieth of the modules is held out. The cache has the hidden states that enter and leave the
teacher's blocks that the student is made of. The arms differ in `objective.layers` alone:

    logits     none
    layers     hidden states and attention of all eight blocks, weights that fall from 100 to 5 and from 20 to 5, by half a
               cosine; attention without the first key
    fading     the same, attention's to 1
    lighter    the same from 30 to 5 and from 6 to 1, in a line
    heavier    the same from 200 to 50 and from 40 to 20, in a line
    all-keys   as `layers`, with the first key

What is reported, on all held-out rows:

    features   of each matched pair of hidden states: the cosine of teacher and student, after a ridge map that is fitted to
               the student's states on rows of the training split, for each arm and pair anew, every position with the
               weight that it has in a cosine, first tokens left out; raw, and both less the teacher's mean
    attention  of each block and the teacher's that it is a copy of: the mean cosine of a query's row over keys and heads,
               without the first key
    loss       cross-entropy, nats a position; and the divergence KL(teacher ‖ student) that is trained

`gain` is the rise of the similarity; where the base is above 0.75, the fall of 1 - cosine. All train in bf16. Stop it at any
time: run again, it goes on where it was. Once there are a cache and a student, two processes with an arm
each share two cores better than one after the other.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kd_against_ce import teachercache
from provenance import add_output_options, provenance, publish
from torch import Tensor
from torch.nn.functional import cosine_similarity

from teachercache.cache import Cache
from teachercache.cache.reader import Split
from teachercache.config import Recipe
from teachercache.corpus.python_docs import python_topics
from teachercache.models.activations import Activations, recorded
from teachercache.models.loading import load_causal_lm, model_inputs
from teachercache.quickstart import student_arguments, write_recipe
from teachercache.targets.layers.attention import log_attention, sees

# `keep:8` keeps the teacher's blocks 1, 5, 9, 13, 18, 22, 26 and 30: what enters the next of them, and they themselves.
HIDDEN = {1: 4, 2: 8, 3: 12, 4: 17, 5: 21, 6: 25, 7: 29, 8: 30}
ATTENTION = {1: 1, 2: 5, 3: 9, 4: 13, 5: 18, 6: 22, 7: 26, 8: 30}
RECIPE = [
    f"targets.hidden={json.dumps({'layers': [0, *HIDDEN.values()]})}",
    f"targets.attention={json.dumps({'layers': [*ATTENTION.values()]})}",
    "corpus.format=jsonl",
    "corpus.limit=null",
    "corpus.held_out=0.05",
    "precompute.unit_bytes=4000000",
    "teacher.dtype=bfloat16",
]


def terms(
    schedule: str, *, hidden: tuple[float, float], attention: tuple[float, float], first_key: bool = False
) -> list[Any]:
    """`hidden` and `attention` are the weights in the beginning and in the end."""
    of_hidden, of_attention = ({"schedule": schedule, "start": start, "end": end} for start, end in (hidden, attention))
    return [
        {"match": "hidden-cosine", "weight": of_hidden, "pairs": HIDDEN},
        {"match": "attention-kl", "weight": of_attention, "pairs": ATTENTION, "first_key": first_key},
    ]


ARMS: dict[str, list[Any]] = {
    "logits": [],
    "layers": terms("cosine", hidden=(100, 5), attention=(20, 5)),
    "fading": terms("cosine", hidden=(100, 5), attention=(20, 1)),
    "lighter": terms("linear", hidden=(30, 5), attention=(6, 1)),
    "heavier": terms("linear", hidden=(200, 50), attention=(40, 20)),
    "all-keys": terms("cosine", hidden=(100, 5), attention=(20, 5), first_key=True),
}
COMMON = ["train.trackers=[]", "train.keep_checkpoints=1", "train.save_every=100000", "train.precision=bf16"]
FITTED_ROWS = 96
RIDGE = 1e-3  # of the states' mean square
SPLITS: tuple[Split, Split] = ("train", "held-out")
LEFT_OUT = ("site-packages", "test", "idlelib", "pydoc_data")  # in a path
SHORT, SHORT_ROW = 60, 400  # characters of a docstring, and of a row, below which it is left out


def library_text(path: Path, packages: list[str]) -> Path:
    """Help topics, and docstrings of the standard library and of packages, as JSON lines: a module a row, a paragraph once."""
    seen: set[str] = set()

    def fresh(text: str) -> str:
        paragraphs = [(" ".join(part.split()), part) for part in re.split(r"\n\s*\n", text)]
        new = [part for key, part in paragraphs if key not in seen]
        seen.update(key for key, _ in paragraphs)
        return "\n\n".join(new)

    rows = [fresh(topic) for topic in python_topics()]
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), *(Path(paths["purelib"], name) for name in packages)]
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py")) if not skipped(file, folder)):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates of lib2to3 and the like
            continue
        nodes = (each for each in ast.walk(tree) if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef))
        found = [text for text in map(ast.get_docstring, nodes) if text and len(text) > SHORT]
        rows.append("\n\n".join(text for text in map(fresh, found) if text))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows if len(row) > SHORT_ROW), encoding="utf-8")
    return path


def skipped(file: Path, folder: Path) -> bool:
    return any(part in str(file.relative_to(folder)) for part in LEFT_OUT)


def prepare(work: Path, packages: list[str]) -> tuple[Path, Recipe]:
    text, begun_with = work / "text.jsonl", work / "packages.json"
    if not text.is_file():
        work.mkdir(parents=True, exist_ok=True)
        begun_with.write_text(json.dumps(packages))
        library_text(text, packages)
    if json.loads(begun_with.read_text()) != packages:
        sys.exit(
            f"error: {work} was begun with --packages {begun_with.read_text()}: say the same or choose another folder"
        )
    recipe_file, recipe = write_recipe(work, [*RECIPE, f"corpus.source={text}"])
    if not (Path(recipe.cache) / "manifest.json").is_file():
        teachercache("precompute", str(recipe_file))
    if not (Path(recipe.student.model) / "config.json").is_file():
        teachercache("init-student", *student_arguments(work, recipe))
    return recipe_file, recipe


def train(output: Path, recipe_file: Path, arm: str, seed: int, options: argparse.Namespace) -> Path:
    settings = [
        *COMMON, f"train.output={output}", f"train.seed={seed}", f"train.max_steps={options.steps}",
        f"train.evaluate_every={max(1, options.steps // 4)}", f"train.learning_rate={options.learning_rate}",
        f"train.global_batch={options.rows}", f"train.micro_batch={options.rows}", f"objective.layers={json.dumps(ARMS[arm])}",
    ]  # fmt: skip
    teachercache("train", str(recipe_file), *(part for setting in settings for part in ("-s", setting)))
    return output


def runs(
    model: Any, cache: Cache, split: Split, *, hidden: Collection[int] = (), attention: Collection[int] = ()
) -> Iterator[Activations]:
    """Maps of each row: rows spread over the training split, all held-out ones."""
    count = cache.rows_of(split)
    for index in np.linspace(0, count - 1, min(count, FITTED_ROWS) if split == "train" else count, dtype=int):
        row = cache.read_row(split, int(index), columns=()).row
        inputs = model_inputs([row], pad_id=0, layout="documents")
        with torch.inference_mode(), recorded(model, hidden=[*hidden], attention=[*attention]) as activations:
            model.base_model(**{name: torch.from_numpy(values) for name, values in inputs.items()}, use_cache=False)
        yield activations


def states(model: Any, cache: Cache, layers: Collection[int]) -> dict[Split, dict[int, Tensor]]:
    """[N, D] of each layer; all tokens of a row but the first."""
    found: dict[Split, dict[int, Tensor]] = {}
    for split in SPLITS:
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for activations in runs(model, cache, split, hidden=layers):
            for layer in layers:
                parts[layer].append(activations.hidden[layer][0, 1:])
        found[split] = {layer: torch.cat(of_rows) for layer, of_rows in parts.items()}
    return found


class Scores(NamedTuple):
    """Parts that a row's maps are made of: linear in its length, as maps are not."""

    queries_BHSE: Tensor
    keys_BKSE: Tensor
    scaling: float

    def maps(self) -> Tensor:
        """[H, T - 2, T - 1], without the first key; the second query sees one key beside it, and counts for nothing."""
        seen = sees(torch, torch.zeros(1, self.queries_BHSE.shape[2], dtype=torch.int64), window=None)
        return log_attention(self.queries_BHSE, self.keys_BKSE, seen, scaling=self.scaling).exp()[0, :, 2:, 1:]


def scores(model: Any, cache: Cache, layers: Collection[int]) -> Iterator[dict[int, Scores]]:
    """Maps of each held-out row."""
    for activations in runs(model, cache, "held-out", attention=layers):
        heads = activations.attention
        yield {layer: Scores(of.queries_BHSE, of.keys_BKSE, of.scaling) for layer, of in heads.items()}


def ridge(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """[Ds + 1, Dt], the constant last. Each position has the weight that it has in a cosine: a few tokens in ten thousand are
    more than a hundred times as long as the others, and would be all that least squares see."""
    weight_N1 = 1 / teacher_ND.norm(dim=-1, keepdim=True)
    student_ND = torch.cat([student_ND, torch.ones(len(student_ND), 1, dtype=student_ND.dtype)], dim=1) * weight_N1
    gram = student_ND.T @ student_ND
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, student_ND.T @ (teacher_ND * weight_N1))


class Teacher:
    """Values of the teacher's layers; kept from the first arm that asks for the others."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    @cached_property
    def states(self) -> dict[Split, dict[int, Tensor]]:
        return states(self._model, self._cache, HIDDEN.values())

    @cached_property
    def scores(self) -> list[dict[int, Scores]]:
        return list(scores(self._model, self._cache, ATTENTION.values()))

    @cached_property
    def _model(self) -> Any:
        return load_causal_lm(self._cache.manifest.teacher["model"], dtype="float32").eval()


def similarity_of_features(model: Any, cache: Cache, teacher: Teacher) -> dict[str, dict[str, float]]:
    ours = states(model, cache, HIDDEN)
    features: dict[str, dict[str, float]] = {"raw": {}, "centred": {}}
    for layer, of_teacher in HIDDEN.items():
        fitted, exact = (teacher.states[split][of_teacher].double() for split in SPLITS)
        of_fitted, found = (ours[split][layer].double() for split in SPLITS)
        map_DD = ridge(of_fitted, fitted)
        found = found @ map_DD[:-1] + map_DD[-1]
        mean = fitted.mean(0)
        name = f"{layer}:{of_teacher}"
        features["raw"][name] = float(cosine_similarity(found, exact, dim=-1).mean())
        features["centred"][name] = float(cosine_similarity(found - mean, exact - mean, dim=-1).mean())
    return features


def similarity_of_attention(model: Any, cache: Cache, teacher: Teacher) -> dict[str, float]:
    cosines: dict[str, list[Tensor]] = defaultdict(list)
    for ours, exact in zip(scores(model, cache, ATTENTION), teacher.scores, strict=True):
        for layer, of_teacher in ATTENTION.items():
            cosine_HT = cosine_similarity(ours[layer].maps(), exact[of_teacher].maps(), dim=-1)
            cosines[f"{layer}:{of_teacher}"].append(cosine_HT.flatten())
    return {pair: float(torch.cat(of_rows).mean()) for pair, of_rows in cosines.items()}


def resemblance(cache: Cache, run: Path, teacher: Teacher) -> dict[str, Any]:
    model = load_causal_lm(str(run / "student"), dtype="float32").eval()
    found: dict[str, Any] = {
        "features": similarity_of_features(model, cache, teacher),
        "attention": similarity_of_attention(model, cache, teacher),
    }
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval_loss" in record]
    curve = {str(record["step"]): record["eval_loss"] for record in evaluated}
    last = {"loss": evaluated[-1]["eval_loss"], "kl": evaluated[-1]["eval_kl"]}
    return {**found, **last, "loss_by_step": curve}


def of_arm(
    arm: str, seed: int, recipe_file: Path, cache: Cache, teacher: Teacher, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one run. Finished ones are read back."""
    name = f"{arm}-{options.steps}-steps-{options.rows}-rows-lr{options.learning_rate:g}-seed{seed}"
    kept = options.work / "results" / f"{name}.json"
    if not kept.is_file():
        run = train(options.work / "runs" / name, recipe_file, arm, seed, options)
        found = resemblance(cache, run, teacher)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"terms": ARMS[arm], **found}))
    result: dict[str, Any] = json.loads(kept.read_text())
    if result.pop("terms") != json.loads(json.dumps(ARMS[arm])):  # numbers of layers are strings there
        sys.exit(f"error: {kept} is of other terms than this arm has; move it and its run, or choose another folder")
    return result


def gain(base: float, found: float) -> float:
    return (found - base) / (1 - base) if base > 0.75 else found / base - 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    recipe_file, recipe = prepare(options.work, options.packages)
    cache = Cache.open(recipe.cache)
    teacher = Teacher(cache)
    arms = {
        arm: [of_arm(arm, seed, recipe_file, cache, teacher, options) for seed in options.seeds] for arm in options.arms
    }
    means = {
        arm: {
            **{
                name: statistics.mean(statistics.mean(run["features"][name].values()) for run in found)
                for name in ("raw", "centred")
            },
            "attention": statistics.mean(statistics.mean(run["attention"].values()) for run in found),
            **{name: statistics.mean(run[name] for run in found) for name in ("loss", "kl")},
        }
        for arm, found in arms.items()
    }
    result = {
        "seeds": options.seeds,
        "steps": options.steps,
        "rows": options.rows,
        "learning_rate": options.learning_rate,
        "positions": cache.manifest.positions,
        "packages": options.packages,
        "terms": {arm: ARMS[arm] for arm in arms},
        "means": means,
        "arms": arms,
    }
    if "logits" in arms:
        base = means["logits"]
        result["gain"] = {
            arm: {name: gain(base[name], found[name]) for name in ("raw", "centred")} for arm, found in means.items()
        }
        result["loss_over_base"] = {arm: found["loss"] / base["loss"] - 1 for arm, found in means.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=2, help="in a step")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--arms", nargs="+", default=["logits", "layers"], choices=list(ARMS))
    parser.add_argument(
        "--packages", nargs="+", default=[], help="installed ones, whose docstrings are added to the text"
    )
    add_output_options(parser)
    options = parser.parse_args()
    publish({**provenance(), **measure(options)}, options)


if __name__ == "__main__":
    main()
