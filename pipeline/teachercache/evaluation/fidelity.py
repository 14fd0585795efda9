"""Fidelity of a cache: runs the teacher again on some of its rows, and compares the result with what is stored.

Per temperature:

    kl                       KL(teacher ‖ stored), nats per position
    gradient_angle_degrees   between the gradients that a student's output matrix gets from the stored and from the exact
                             teacher, summed over all positions: Σ (q - p)·sᵀ
    gradient_cosine_p05      of the same gradients position by position, the 5 % quantile
    ece                      calibration error of the stored first choice against the real next token (Guo et al. 2017); at
                             T = 1 alone: a softened distribution is no forecast of the next token

The student q is the teacher without its last block: s is what enters the output layer then. A student that is nearly the
teacher would only measure rounding, a random one hardly sees the tail.

Rows of documents that calibration saw are never used. Shapes: N positions, V vocabulary, D width of s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teachercache.cache import Cache, Manifest, StoredRow
from teachercache.cache.checking import NoProgress, Progress
from teachercache.cache.reader import Split
from teachercache.errors import CacheError, ModelError, UserError
from teachercache.evaluation.layer_fidelity import LayerComparison
from teachercache.models.activations import path_of_blocks
from teachercache.models.loading import find_model, load_causal_lm, model_inputs, weights_identity
from teachercache.stream.order.permutation import order_key, permuted
from teachercache.targets import TAIL_POLICIES, Softened, TargetKind
from teachercache.targets.logits.softened import UniformTail
from teachercache.teacher.output_layer import OutputLayer, layer_after_body, recorded_input
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURES = (1.0, 2.0, 4.0)
BLOCK = 128  # positions
DRAWN_AT_ONCE = 1024  # rows
LEAST_PROBABILITY = 1e-12  # what a token counts for that is stored without any mass: KL stays finite
ECE_BINS = 15


def run_fidelity(
    cache: Cache,
    *,
    teacher: str | None = None,
    rows: int = 32,
    temperatures: Sequence[float] = TEMPERATURES,
    tail: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    other_weights: bool = False,
    seed: int = 0,
    at_most: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare `rows` rows of a cache, spread over both splits, with the teacher; what `teachercache fidelity` prints.

    `seed` draws the rows: whoever made a cache cannot know which ones a receiver's seed draws. With `at_most` the result's `ok`
    tells whether the KL divergence is no larger, in nats, at any of the temperatures.

    `teacher` says where it is, by default where the manifest says. `tail` is the policy by which targets are read, by
    default the first of the kind's that gives every token a probability. Raises `CacheError` when there is no row to
    compare, `ModelError` when the teacher cannot be loaded, has other weights than the cache's, or a smaller vocabulary.
    `trust_remote_code` runs Python code that comes with the model; `other_weights` takes one whose files differ.
    """
    manifest = cache.manifest
    policy = tail or dense_policy(cache.kind)
    for temperature in temperatures:
        cache.kind.check_temperature(temperature)
    chosen = _rows(cache, rows, seed=seed)
    named = teacher or manifest.teacher["model"]
    _check_weights(manifest.teacher, teacher, other_weights=other_weights)
    model = _load_teacher(manifest, named, trust_remote_code=trust_remote_code)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    vocabulary = manifest.vocabulary_size
    layer = layer_after_body(model, vocabulary_size=vocabulary)
    comparison, layers = Comparison(temperatures), LayerComparison(cache.targets)
    progress = progress or NoProgress()
    progress.begin("rows", len(chosen))
    for stored in chosen:
        layers.add(model, stored, pad_id=manifest.pad_id, layout=manifest.layout)
        logits_NV, student_NV, input_ND = observe(
            model, stored.row, pad_id=manifest.pad_id, layout=manifest.layout, layer=layer
        )
        labels_N = torch.from_numpy(cache.task.labels_N(stored.row).astype(np.int64)).to(logits_NV.device)
        comparison.add(
            lambda temperature, stored=stored, like=logits_NV: read(
                cache.kind, {name: stored.targets[name] for name in cache.logit_columns}, temperature, policy, like
            ),
            logits_NV[:, :vocabulary],
            student_NV[:, :vocabulary],
            input_ND,
            labels_N,
        )
        progress.advance(1)
    measured = comparison.result()
    accepted = {} if at_most is None else {"ok": _largest_kl(measured) <= at_most, "at_most": at_most}
    return {
        **accepted,
        "cache": cache.name,
        "teacher": named,
        "targets": manifest.logits,
        "tail": policy,
        "seed": seed,
        "rows": len(chosen),
        "positions": comparison.positions,
        "temperatures": measured,
        **layers.result(),
        "bytes_per_position": manifest.bytes_per_position(),
        "basis_bytes": sum(info.bytes for info in manifest.files if info.file.endswith(".safetensors")),
    }


def _load_teacher(manifest: Manifest, named: str, *, trust_remote_code: bool) -> Any:
    """As the cache's job loaded it; raises `ModelError`."""
    settings = manifest.teacher
    model: Any = load_causal_lm(
        named,
        revision=settings.get("commit") or settings.get("revision") if named == settings["model"] else None,
        dtype=settings["dtype"],
        trust_remote_code=trust_remote_code,
        attention=settings.get("attention"),
    )
    layer = model.get_output_embeddings()
    if layer is None or len(layer.weight) < manifest.vocabulary_size:
        raise ModelError(
            f"{named} predicts fewer tokens than the cache's tokenizer has "
            f"({manifest.vocabulary_size}): it is not the teacher of this cache"
        )
    return model


def _check_weights(settings: Mapping[str, Any], named: str | None, *, other_weights: bool) -> None:
    """A cache that was made from local files pins their digest; a hub's commit is loaded by its name."""
    expected = settings.get("weights_sha256")
    if not expected:
        return
    model = named or settings["model"]
    if named is None and not find_model(model).is_local:
        raise ModelError(f"the teacher of this cache was {model}, files that are not here; say where: --teacher PATH")
    digest = weights_identity(model, revision=None, commit=None).get("weights_sha256")
    if digest != expected and not other_weights:
        raise ModelError(
            f"the files of {model} are not those of this cache's teacher (their digests differ); name the right ones with "
            "--teacher, or compare all the same with --other-weights"
        )


def parse_options(temperatures: str, tail: str | None) -> dict[str, Any]:
    """`temperatures` and `tail` of `run_fidelity` from what a user typed; raises `UserError`."""
    try:
        values = tuple(float(part) for part in temperatures.split(","))
        if not all(math.isfinite(value) for value in values):
            raise ValueError
    except ValueError:
        raise UserError(f"--temperatures {temperatures!r} is no list of numbers; write e.g. 1,2,4") from None
    if tail is not None:
        TAIL_POLICIES.get(tail)  # an installed extension may have it
    allowed = [name for name, policy in TAIL_POLICIES.items() if policy.tells_tokens_apart]
    if tail is not None and tail not in allowed:
        raise UserError(f"--tail {tail!r} gives no token outside the head a probability; use {', '.join(allowed)}")
    return {"temperatures": values, "tail": tail}


def dense_policy(kind: TargetKind) -> str:
    """The first of a kind's tail policies that gives every token a probability."""
    return next(name for name in kind.tail_policies if TAIL_POLICIES[name].tells_tokens_apart)


def read(kind: TargetKind, stored: Mapping[str, Any], temperature: float, tail: str, like: Tensor) -> Softened:
    """One row's columns as a distribution over all tokens, float32 on the device of `like`."""
    arrays = {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
        for name, values in kind.decoded(stored).items()
    }
    arrays = {name: values.float() if values.is_floating_point() else values.long() for name, values in arrays.items()}
    softened = kind.softened(arrays, temperature, tail=tail, xp=torch)
    if softened.tail is None:  # no mass outside the head: spread it evenly
        return softened.with_tail(UniformTail(kind.vocabulary_size, softened.head_log_prob_Nk))
    return softened


def _largest_kl(measured: Mapping[str, Mapping[str, float]]) -> float:
    """Over the temperatures; infinite where one of them is no number."""
    largest = max(figures["kl"] for figures in measured.values())
    return largest if all(math.isfinite(figures["kl"]) for figures in measured.values()) else math.inf


def _rows(cache: Cache, count: int, *, seed: int) -> list[StoredRow]:
    """Drawn from the whole cache, the same ones for a seed, without those of a document that the sketch was fitted to."""
    seen = set(cache.manifest.calibration.get("sources", ()))
    train = cache.rows_of("train")
    total = train + cache.rows_of("held-out")
    chosen: list[StoredRow] = []
    for start in range(0, total, DRAWN_AT_ONCE):
        drawn = np.arange(start, min(start + DRAWN_AT_ONCE, total), dtype=np.int64)
        for index in permuted(
            drawn, size=total, key=order_key(cache.manifest.fingerprint, seed=seed, epoch=0)
        ).tolist():
            place: tuple[Split, int] = ("train", index) if index < train else ("held-out", index - train)
            if not seen or not seen & _sources(cache.read_row(*place, columns=())):
                chosen.append(cache.read_row(*place))
            if len(chosen) == count:
                return chosen
    if not chosen:
        raise CacheError(
            f"every row of {cache.name} was used to fit the sketch, so that none is left to measure it on; "
            "precompute a larger corpus, or lower targets.logits.calibration_positions"
        )
    return chosen


def _sources(stored: StoredRow) -> set[str]:
    return {segment.source_id for segment in stored.row.segments}


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    row: TokenRow,
    *,
    pad_id: int,
    layout: str,
    layer: OutputLayer | None = None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """At a row's positions: the teacher's logits, the logits of the student that is made of it, and what entered the
    output layer then; float32 [N, V], [N, V], [N, D]. `share` as for `weakened_last_block`.

    With `layer` the teacher's logits are summed in float32, as a cache's are; its own are rounded if it is half-precision.
    """
    inputs = {
        name: torch.from_numpy(values).to(model.device)
        for name, values in model_inputs([row], pad_id=pad_id, layout=layout).items()
    }
    chosen = torch.from_numpy(np.flatnonzero(row.target_mask_S)).to(model.device)
    with recorded_input(model) as recorded:
        logits_NV = model(**inputs, use_cache=False).logits[0, chosen].float()
    if layer is not None:
        logits_NV = layer.logits(recorded[0][0, chosen])
    with weakened_last_block(model, share=share), recorded_input(model) as recorded:
        student_NV = model(**inputs, use_cache=False).logits[0, chosen].float()
    return logits_NV, student_NV, recorded[0][0, chosen].float()


@contextmanager
def weakened_last_block(model: PreTrainedModel, *, share: float = 0.0) -> Iterator[None]:
    """While it is open, a share of what the model's last block adds to its input is left, 0: its input passes unchanged.

    Raises `ModelError` for unknown shapes.
    """
    path = path_of_blocks(model)
    if path is None:
        raise ModelError(
            f"{type(model).__name__} does not keep its blocks in one list: no student can be cut out of it"
        )

    def weaken(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        hidden = before + share * ((output[0] if isinstance(output, tuple) else output) - before)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks: Any = model.get_submodule(path)
    handle = blocks[-1].register_forward_hook(weaken, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Sums:
    kl: float = 0.0
    exact: Tensor | None = None  # gradient [V, D]
    stored: Tensor | None = None
    cosines: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)


class Comparison:
    """Sums over rows. Memory: two gradients [V, D] for each temperature."""

    def __init__(self, temperatures: Sequence[float]) -> None:
        self._sums = {temperature: _Sums() for temperature in temperatures}
        self.positions = 0

    @torch.inference_mode()
    def add(self, stored_at: Any, logits_NV: Tensor, student_NV: Tensor, input_ND: Tensor, labels_N: Tensor) -> None:
        """A row, or its first N positions. `stored_at(T)` is what is stored, a `Softened` of at least as many."""
        positions = len(logits_NV)
        self.positions += positions
        for temperature, sums in self._sums.items():
            softened = stored_at(temperature)
            for start in range(0, positions, BLOCK):
                part = slice(start, min(start + BLOCK, positions))
                log_p_CV = torch.log_softmax(logits_NV[part] / temperature, dim=-1)
                log_stored_CV = softened.dense(part).clamp_min_(math.log(LEAST_PROBABILITY))
                student_CV = torch.softmax(student_NV[part] / temperature, dim=-1)
                self._block(sums, log_p_CV, log_stored_CV, student_CV, input_ND[part], labels_N[part])

    @staticmethod
    def _block(
        sums: _Sums, log_p_CV: Tensor, log_stored_CV: Tensor, student_CV: Tensor, input_CD: Tensor, labels_C: Tensor
    ) -> None:
        p_CV, stored_CV = log_p_CV.exp(), log_stored_CV.exp()
        sums.kl += float((p_CV * (log_p_CV - log_stored_CV)).sum(dtype=torch.float64))
        exact_CV, approximate_CV = student_CV - p_CV, student_CV - stored_CV
        sums.cosines.append(torch.nn.functional.cosine_similarity(exact_CV, approximate_CV, dim=-1))
        confidence_C, choice_C = stored_CV.max(dim=-1)
        sums.confidence.append(confidence_C)
        sums.correct.append(choice_C == labels_C)
        exact_VD, stored_VD = exact_CV.T @ input_CD, approximate_CV.T @ input_CD
        sums.exact = exact_VD if sums.exact is None else sums.exact.add_(exact_VD)
        sums.stored = stored_VD if sums.stored is None else sums.stored.add_(stored_VD)

    def result(self) -> dict[str, dict[str, float]]:
        """The figures by temperature, as text: `{"1": {"kl": …}, …}`."""
        return {f"{temperature:g}": self._figures(temperature, sums) for temperature, sums in self._sums.items()}

    def _figures(self, temperature: float, sums: _Sums) -> dict[str, float]:
        assert sums.exact is not None and sums.stored is not None
        figures = {
            "kl": sums.kl / self.positions,
            "gradient_angle_degrees": angle_degrees(sums.exact, sums.stored),
            "gradient_cosine_p05": float(torch.cat(sums.cosines).quantile(0.05)),
        }
        if temperature == 1:
            figures["ece"] = calibration_error(torch.cat(sums.confidence), torch.cat(sums.correct))
        return figures


def angle_degrees(left: Tensor, right: Tensor) -> float:
    """Between two tensors taken as vectors. By way of the difference of directions: acos loses what is below 0.02 degrees."""
    left, right = left.flatten().double(), right.flatten().double()
    half = (left / left.norm() - right / right.norm()).norm() / 2
    return math.degrees(2 * math.asin(min(1.0, float(half))))


def calibration_error(confidence_N: Tensor, correct_N: Tensor) -> float:
    """Expected calibration error: |confidence - accuracy| over `ECE_BINS` equal bins, weighted by their size."""
    bins_N = (confidence_N * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    error = torch.zeros((), dtype=torch.float64)
    for number in range(ECE_BINS):
        inside_N = bins_N == number
        if inside_N.any():
            gap = confidence_N[inside_N].double().mean() - correct_N[inside_N].double().mean()
            error += gap.abs().cpu() * inside_N.sum().cpu() / len(bins_N)
    return float(error)
