"""The tables of docs/results, from what benchmarks recorded in tests/bench/results.

A page holds `<!-- generated: NAME -->`, a table with the command, the date and the machine of its run, and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
RESULTS = Path("tests") / "bench" / "results"
Result = dict[str, Any]
HEADS = 9  # of the teacher of layer_fidelity


@dataclass(frozen=True)
class Run:
    """One recorded run: the file, what was typed, the day it was recorded, and its table."""

    file: str
    command: str
    date: str
    table: Callable[[Result], str]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(text: str, root: Path) -> str:
    """A page whose generated parts are what the recorded results say now."""
    return MARKED.sub(lambda match: f"{match[1]}\n{block(RUNS[match[2]], root)}\n\n{match[4]}", text)


def block(run: Run, root: Path) -> str:
    """The table of a run, and how it was made."""
    path = RESULTS / f"{run.file}.json"
    result = json.loads((root / path).read_text(encoding="utf-8"))
    made = f"{run.date}, {result['device']}, commit {result['commit'].removesuffix('-dirty')}"
    link = f"[`{run.file}.json`](../../{path.as_posix()})"
    return f"{run.table(result)}\n\n    {run.command}\n\n*{made}; in full in {link}.*"


def three(values: Iterable[float], digits: int | None = None) -> str:
    """Figures with slashes between them, to two places or so many as there is room for."""
    return " / ".join(f"{value:.{digits}f}" if digits is not None else _short(value) for value in values)


def _short(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 0}f}"


def _codec(result: Result) -> str:
    rows = []
    for name, kind in result["kinds"].items():
        by_temperature = kind["temperatures"].values()
        rows.append([
            name,
            f"{kind['bytes']:.0f}",
            three(each["kl"] if each["kl"] >= 1e-3 else round(each["kl"], 4) for each in by_temperature)
            if max(each["kl"] for each in by_temperature) >= 1e-3
            else three((each["kl"] for each in by_temperature), 4),
            three(each["gradient_angle_degrees"] for each in by_temperature),
            f"{kind['temperatures']['1']['ece']:.3f}",
        ])  # fmt: skip
    head = ["targets", "bytes per position", "KL at T = 1 / 2 / 4, nats", "gradient angle at T = 1 / 2 / 4, degrees"]
    return table([*head, "ECE at T = 1"], rows)


def _codec_others(result: Result) -> str:
    """The kinds that are no sketch."""
    kinds = {name: kind for name, kind in result["kinds"].items() if not name.startswith("head+sketch")}
    return _codec({**result, "kinds": kinds})


def _codec_closer(result: Result) -> str:
    """The table, and what one kind's closer look found."""
    late = result["kinds"]["head+sketch, compact"]
    angles = late["late_student"].values()
    documents = late["documents"]["1"]
    parts = [
        ["gradient angle of `compact` over the first half of the positions, T = 1 / 2 / 4, degrees",
         three(late["halfway"].values())],
        ["gradient angle of `compact` for a late student, T = 1 / 2 / 4, degrees",
         three((each["gradient_angle_degrees"] for each in angles), 1)],
        ["the same in rows of 256 tokens at T = 1, least and most", f"{documents['least']:.1f}, {documents['most']:.1f}"],
        ["positions/s that one core decodes", f"{late['decode']:,}"],
    ]  # fmt: skip
    return f"{_codec(result)}\n\n{table(['what', 'figure'], parts)}"


def _codec_sample(result: Result) -> str:
    """Kinds that calibrate, with the sample's size."""
    rows = []
    for name, kind in result["kinds"].items():
        figures = kind["temperatures"].values()
        rows.append([
            name, f"{result['calibration']:,}", f"{kind['bytes']:.0f}", three(figure["kl"] for figure in figures),
            three(figure["gradient_angle_degrees"] for figure in figures), three(kind["halfway"].values()),
        ])  # fmt: skip
    head = ["targets", "calibration positions", "bytes per position", "KL at T = 1 / 2 / 4, nats"]
    angle = "gradient angle at T = 1 / 2 / 4, degrees"
    return table([*head, angle, f"over the first {result['positions'] // 2:,} positions alone"], rows)


def _quality(result: Result) -> str:
    rows = []
    for name, arms in result["schedules"].items():
        live, sketch, top = arms["live"], arms["sketch"], arms["top-50"]
        by_seed = f"; by seed {100 * min(sketch['worse_by_seed']):.2f} to {100 * max(sketch['worse_by_seed']):.2f}"
        rows.append([
            name.replace("-", ", then "),
            f"{live['loss']:.3f}",
            f"{sketch['loss']:.3f} (+{100 * sketch['worse_than_live']:.2f} %{by_seed})",
            f"{top['loss']:.3f} (+{100 * top['worse_than_live']:.1f} %)",
        ])  # fmt: skip
    return table(["temperature", "live teacher, all logits", "head+sketch, compact", "top-50, renormalised"], rows)


def _against_ce(result: Result) -> str:
    rows = []
    for name, arm in (("cross-entropy alone", "ce"), ("from the cache, α = 0.9, T = 1", "kd")):
        figures = result["arms"][arm]
        agrees = figures["top1_agreement"]
        rows.append([
            name,
            f"{result['best_learning_rate'][arm]:g}",
            _spread(figures["loss"]),
            f"{100 * agrees['mean']:.1f} % ({100 * agrees['spread']:.1f})",
            _spread(figures["kl"]),
        ])  # fmt: skip
    agrees_head = "agrees with the teacher's first choice"
    return table(
        ["", "learning rate", "held-out loss, nats (spread over seeds)", agrees_head, "KL to the teacher"], rows
    )


def _spread(figure: Result) -> str:
    return f"{figure['mean']:.3f} ({figure['spread']:.3f})"


PARTS = {
    "fixed": "fixed T = 3",
    "linear": "T from 5 to 1: linear",
    "stepwise": "T 5, 3, 1 in thirds",
    "cosine": "T from 5 to 1: cosine",
    "student-loss": "T by the student's loss",
    "ratio": "alpha balanced by the ratio of losses",
    "uncertainty": "alpha balanced by uncertainty",
    "two-teachers": "a second teacher, half and half: a copy tuned on the rows",
    "three-phases": "phases: 40 % of the steps on other text at T = 3, then T = 2, then T = 1",
    "general": "other text alone (docstrings of numpy and torch), T = 3",
}


def _parts(result: Result) -> str:
    rows = []
    for arm, name in PARTS.items():
        figures = result["arms"][arm]
        steps = figures["steps_to_fixed"]["kl"]
        rows.append([
            name,
            _spread(figures["loss"]),
            _spread(figures["kl"]),
            f"{100 * figures['top1_agreement']['mean']:.1f} %",
            ", ".join("never" if step is None else str(step) for step in steps) if any(steps) else "never",
        ])  # fmt: skip
    head = ["", "held-out loss, nats (spread over seeds)", "KL to the teacher at T = 1", "agrees with its first choice"]
    return table([*head, "step at which it has the fixed run's final KL, by seed"], rows)


def _online(result: Result) -> str:
    loss, ratio = result["held_out_loss"], result["ratios"]
    rows = [
        ["from the cache", f"{loss['cache']:.3f}", "1"],
        ["with the live teacher in the step", f"{loss['online']:.3f}", f"{ratio['online_over_cache']:.2f}"],
        ["plain fine-tuning, no teacher", f"{loss['ce']:.3f}", f"{1 / ratio['cache_over_ce']:.2f}"],
    ]
    return table(["the same student, 40 steps, T = 1", "held-out loss, nats", "time of a step over the cache's"], rows)


def _hidden(result: Result) -> str:
    names = {"int8 0.08": "`int8`, step 0.08 (the default)", "projected 0.6": "`projected`, step 0.6", "bf16": "`bf16`"}
    rows = []
    for key, name in names.items():
        mean = result["hidden"][key]["mean"]
        digits = 6 if mean["cosine"] > 0.99999 else 5 if mean["cosine"] > 0.999 else 4
        cosines = f"{mean['cosine']:.{digits}f}; {mean['cosine_centred']:.{digits}f}"
        rows.append([name, f"{mean['bytes_per_channel']:.2f}", cosines])
    head = "cosine with the original; both less the mean over the corpus"
    return table(["hidden states, SmolLM2-135M", "bytes a channel", head], rows)


def _attention_bytes(result: Result) -> str:
    rows = []
    for length, kinds in result["by_length"].items():
        cells = [
            f"{kinds[name]['bytes']:,.0f}; {_one_digit(kinds[name]['kl'])}"
            for name in ("relations", "queries-keys", "maps")
        ]
        rows.append([length, *cells, f"{2 * HEADS * int(length):,}"])
    return table(["tokens in a row", "`relations`", "`queries-keys`", "`maps`", "full square in 16 bits"], rows)


def _one_digit(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{float(f'{value:.0e}'):.5f}".rstrip("0")


ARMS = {
    "logits": "logits alone",
    "lighter": "30 to 5; 6 to 1 (`linear`)",
    "fading": "100 to 5; 20 to 1 (`cosine`)",
    "layers": "100 to 5; 20 to 5 (`cosine`)",
    "heavier": "200 to 50; 40 to 20 (`linear`)",
}


def _layer_quality(result: Result) -> str:
    rows = []
    for arm, name in ARMS.items():
        means, losses = result["means"][arm], result["arms"][arm][0]["loss_by_step"].values()
        cosines = f"{means['raw']:.3f}; {means['centred']:.3f}"
        rows.append([name, three(losses, 3), f"{means['kl']:.3f}", cosines, f"{means['attention']:.3f}"])
    steps = " / ".join(f"{int(step):,}" for step in result["arms"]["logits"][0]["loss_by_step"])
    return table(
        ["weights of `hidden-cosine`; `attention-kl`", f"held-out cross-entropy, nats, after {steps} steps",
         "KL(teacher ‖ student)", "cosine of hidden states after a ridge map; both less the teacher's mean",
         "cosine of attention, first key left out"], rows,
    )  # fmt: skip


LOSSES = {
    "default": "projected KL and chunk likelihood (the default)",
    "ce": "cross-entropy alone",
    "projected-kl": "projected KL alone",
    "chunk-likelihood": "chunk likelihood alone",
    "sorted-probabilities": "sorted probabilities alone",
}


def _across(result: Result) -> str:
    arms = {arm: result["arms"][arm]["bits_per_byte"] for arm in LOSSES}
    rows = [[LOSSES[arm], f"{figure['mean']:.3f}", str(len(figure["values"]))] for arm, figure in arms.items()]
    return table(["loss", "bits per held-out byte", "seeds"], rows)


def _peers(result: Result) -> str:
    names = {
        "trl": "TRL `GKDTrainer`, live teacher",
        "trl, checkpointing": "the same with gradient checkpointing",
        "distillkit, 50": "DistillKit from stored logits, top-50",
        "distillkit, 128": "DistillKit from stored logits, top-128",
    }
    over = result["over_ours"]
    rows = [[name, f"{over[key]['seconds']:.2f}", f"{over[key]['peak_megabytes']:.2f}"] for key, name in names.items()]
    return table(["", "step over ours", "peak memory over ours"], rows)


def _readers(result: Result) -> str:
    rows = []
    for key, name in (("streaming", "MosaicML Streaming (MDS, zstd)"), ("datasets", "`datasets` (Parquet, zstd)")):
        clock, cpu = (result[f"ours over, by {unit}"][key] for unit in ("seconds", "cpu_seconds"))
        large, large_cpu = (result[f"ours, large over, by {unit}"][key]["later"] for unit in ("seconds", "cpu_seconds"))
        epochs = [f"{clock[epoch]:.1f} ({cpu[epoch]:.1f})" for epoch in ("first", "later")]
        rows.append([name, *epochs, f"{large:.1f} ({large_cpu:.1f})"])
    beyond = "a cache beyond the 256 MiB that stay decompressed, later epochs"
    return table(["", "first epoch", "later epochs", beyond], rows)


def _emphasis(result: Result) -> str:
    rows = [[f"`{name}`", f"{ratio:.2f}"] for name, ratio in result["step"]["ratio_to_none"].items() if name != "none"]
    return table(["`objective.emphasis` (a number: `top`)", "step over one without"], rows)


def _divergence(result: Result) -> str:
    names = {"chunked ce": "cross-entropy in chunks", "ghost T=1": "tail as a bucket, T = 1",
             "ghost T=2": "tail as a bucket, T = 2", "sketch T=1": "sketch of rank 320, T = 1",
             "sketch T=2": "sketch of rank 320, T = 2"}  # fmt: skip
    ratios = result["step"]["ratio_to_ce"]
    return table(
        ["loss", "step over plain cross-entropy's"], [[name, f"{ratios[key]:.2f}"] for key, name in names.items()]
    )


def _fusion(result: Result) -> str:
    ratios = result["loss"]["ratio_to_one"]
    rows = []
    for name, told in (
        ("arithmetic", "arithmetic"),
        ("geometric", "geometric"),
        ("other tokens", "the second with other tokens"),
    ):
        rows.append([told, three((ratios[f"{name} T={temperature}"] for temperature in (1, 2)), 2)])
    return table(["fusion of two teachers", "loss of a step over one teacher's, T = 1 / 2"], rows)


def _precision(result: Result) -> str:
    over = result["of_fp32"]["bf16"]
    names = {"step": "memory of a step", "peak": "memory at its peak", "milliseconds": "time of a step"}
    return table(["bf16 over fp32", "ratio"], [[name, f"{over[key]:.2f}"] for key, name in names.items()])


def _zero3(result: Result) -> str:
    over = result["of_student"]
    names = {"started": "until the first step begins", "step": "until it has ended"}
    rows = [[name, *(f"{over[way][key]:.2f}" for way in ("whole", "parts"))] for key, name in names.items()]
    return table(
        ["peak of a process over the student's own size", "loaded whole, then cut up", "loaded in parts"], rows
    )


def _precompute(result: Result) -> str:
    rows = [
        ["the bare forward pass, output projection included", f"{result['ratio']:.2f}"],
        ["the same with the allocator's settings that the job gives its actors",
         f"{result['ratio_to_bare_that_keeps_memory']:.2f}"],
    ]  # fmt: skip
    return table(["positions/s of the whole job over those of", "ratio"], rows)


def _open(result: Result) -> str:
    rows = [
        ["to open it", f"{result['open_seconds']:.1f} s, {result['open_megabytes']:.0f} MB"],
        ["to its first batch", f"{result['first_batch_seconds']:.1f} s"],
    ]
    return table([f"a cache of {result['shards']:,} shards", "figure"], rows)


def _reading(result: Result) -> str:
    names = {
        "open": "to open a cache",
        "verify": "verify",
        "first": "first pass, hashing in it",
        "later": "a later pass",
    }
    rows = []
    for name, ratio in result["ratios"].items():
        what, _, kind = name.partition(" ")
        rows.append([names[what] + (f", {kind}" if kind else ""), f"{ratio:.2f}"])
    return table(["512 rows, format 2 over format 1 (commit 0b91fec)", "processor time"], rows)


def _flips(result: Result) -> str:
    rows = [
        [name, *(str(count.get(kind, 0)) for kind in ("found", "unread", "missed"))]
        for name, count in result["counts"].items()
    ]
    return table([f"{result['flips']:,} flips, {result['files']} files", "found", "not read", "missed"], rows)


def _object_store(result: Result) -> str:
    names = {"cold": "cold", "ahead": "fetching ahead", "warm": "from local copies", "folder": "from a folder"}
    rows = [[name, f"{round(result[key]['rows_per_second'], -1):,.0f}"] for key, name in names.items()]
    first = ["seconds to the first row, cold", f"{result['cold']['first_row_seconds']:.1f}"]
    return table([f"a store that answers after {result['latency']} s", "rows/s"], [*rows, first])


def _join(result: Result) -> str:
    seconds = result["read_seconds_a_cache"] + result["look_up_seconds"]
    return table(
        ["to join two caches", "seconds", "MB"],
        [[f"{result['rows']:,} rows", f"{seconds:.1f}", f"{result['megabytes']:.0f}"]],
    )


def _attention(result: Result) -> str:
    memory = result["megabytes"]["ours"] / result["megabytes"]["plain"]
    shape = f"{result['rows']} rows of {result['length']}"
    return table(["KL between attention maps over plain autograd", "time", "memory"],
                 [[shape, f"{result['ratio_to_plain']['ours']:.2f}", f"{memory:.2f}"]])  # fmt: skip


def _alignment(result: Result) -> str:
    rows = []
    for name, figures in result["students"].items():
        microseconds = 1000 / figures["thousand_tokens_per_second"]
        rows.append(
            [
                name,
                f"{microseconds:.2f}",
                f"{100 * figures['bytes_aligned']:.0f} %",
                f"{figures['bytes_per_chunk']:.2f}",
            ]
        )
    return table(["student's tokenizer", "µs a token, one core", "bytes aligned", "bytes a chunk"], rows)


def _beginnings(result: Result) -> str:
    cached, forms = result["cached"], result["forms"]
    names = {"auto": "what the tokenizer puts there (BOS)", "none": "nothing", "eos": "the end token", "bos": "BOS"}
    rows = []
    for form, figures in forms.items():
        stored = cached.get(f"prefix {form}")
        told = f"{stored['nats']:.3f}" if stored else "–"
        rows.append([names[form], told, f"{figures['nats']:.3f}", f"{100 * figures['first_choice_as_auto']:.0f} %"])
    head = [f"{result['model']}: in front of each window", "cached loss, nats", "the model's own on the same windows"]
    return table([*head, "first choices as in the first line"], rows)


BENCH = "python tests/bench"
LAYERS = "-s 'targets.hidden={layers: [12, 21, 29, 30]}' -s 'targets.attention={layers: [30]}'"
QUALITY = "--packages numpy datasets huggingface_hub --steps 2500 --arms logits lighter fading layers heavier"
GEMMA = "gemma3-270m.gguf --text README.md --characters 5000"
SKETCHES = '--only "head+sketch, compact" "head+sketch, fine"'
HIDDEN = '--only "head+sketch, compact" "hidden state, steps of 1/32"'
SMALL = '--calibration 4096 --only "head+sketch, compact" --briefly'
LARGE = '--teacher gemma3-270m.gguf --only "head+sketch, compact" --briefly'
RUNS = {
    run.file: run
    for run in (
        Run("codec_fidelity_sketches", f"{BENCH}/codec_fidelity.py {SKETCHES}", "2026-11-29", _codec_closer),
        Run("codec_fidelity", f"{BENCH}/codec_fidelity.py", "2026-11-22", _codec_others),
        Run("codec_fidelity_closer", f"{BENCH}/codec_fidelity.py {HIDDEN}", "2026-11-22", _codec_others),
        Run("codec_fidelity_small", f"{BENCH}/codec_fidelity.py {SMALL}", "2026-11-29", _codec_sample),
        Run("codec_fidelity_gemma", f"{BENCH}/codec_fidelity.py {LARGE}", "2026-11-29", _codec_sample),
        Run("row_beginnings", f"{BENCH}/row_beginnings.py {GEMMA}", "2026-11-29", _beginnings),
        Run("student_quality", f"{BENCH}/student_quality.py runs/quality --epochs 1", "2026-11-22", _quality),
        Run("kd_against_ce", f"{BENCH}/kd_against_ce.py runs/kd", "2026-11-22", _against_ce),
        Run("objective_parts", f"{BENCH}/objective_parts.py runs/parts", "2026-11-22", _parts),
        Run("online_vs_cache", f"{BENCH}/online_vs_cache.py runs/online", "2026-11-22", _online),
        Run("layer_fidelity", f"{BENCH}/layer_fidelity.py --positions 2048", "2026-11-22", _hidden),
        Run("layer_quality", f"{BENCH}/layer_quality.py WORK {QUALITY}", "2026-11-23", _layer_quality),
        Run(
            "other_tokenizer",
            f"{BENCH}/other_tokenizer.py WORK --steps 108 --learning-rate 6e-4 --others 1",
            "2026-11-23",
            _across,
        ),
        Run("alignment_speed", f"{BENCH}/alignment_speed.py", "2026-11-22", _alignment),
        Run(
            "trl_distillkit",
            f"{BENCH}/trl_distillkit.py runs/peers --distillkit CHECKOUT --rounds 3",
            "2026-11-22",
            _peers,
        ),
        Run("reader_peers", f"{BENCH}/reader_peers.py runs/readers", "2026-11-22", _readers),
        Run("emphasis_cost", f"{BENCH}/emphasis_cost.py --layers 8 --rows 2 --rounds 5", "2026-11-22", _emphasis),
        Run(
            "divergence_step", f"{BENCH}/divergence_step.py --only step --rounds 4 --rows 2", "2026-11-22", _divergence
        ),
        Run("fusion_cost", f"{BENCH}/fusion_cost.py --rows 4 --rounds 5", "2026-11-22", _fusion),
        Run("join_rows", f"{BENCH}/join_rows.py", "2026-11-22", _join),
        Run("precision_memory", f"{BENCH}/precision_memory.py runs/bench", "2026-11-22", _precision),
        Run("zero3_memory", f"{BENCH}/zero3_memory.py WORK", "2026-11-29", _zero3),
        Run(
            "precompute_speed",
            f"{BENCH}/precompute_speed.py runs/bench --repeats 2 -s corpus.limit=16",
            "2026-11-29",
            _precompute,
        ),
        Run(
            "precompute_speed_layers",
            f"{BENCH}/precompute_speed.py WORK --limit 16 --repeats 1 {LAYERS}",
            "2026-11-22",
            _precompute,
        ),
        Run("open_cache", f"{BENCH}/open_cache.py CACHE", "2026-11-22", _open),
        Run(
            "reading_cost",
            f"{BENCH}/reading_cost.py WORK --against CHECKOUT --rows 512 --rounds 5",
            "2026-11-29",
            _reading,
        ),
        Run("object_store", f"{BENCH}/object_store.py CACHE", "2026-11-22", _object_store),
        Run("bit_flips", f"{BENCH}/bit_flips.py --flips 1000", "2026-11-29", _flips),
        Run("attention_cost", f"{BENCH}/attention_cost.py --threads 1", "2026-11-23", _attention),
    )
}
RUNS["layer_fidelity_attention"] = Run("layer_fidelity", RUNS["layer_fidelity"].command, "2026-11-22", _attention_bytes)
