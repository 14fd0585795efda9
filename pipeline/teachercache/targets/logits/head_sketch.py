"""Target kind `head+sketch`: an exact head, the tail's mass at every temperature, and a sketch of the tail's shape.

Per position, entropy-coded:

    head_ranks           [k]     the k largest logits' tokens, as ranks of frequency, largest logit first
    head_gaps            [k-1]   how far each logit lies below the one before, in steps of HEAD_STEP
    tail_nodes           [6]     log-partition of the tokens outside the head (tail.py)
    sketch_codes         [r]     coefficients of the final hidden state in the basis (basis.py), less their block mean
    sketch_means         [r]     their mean over MEAN_BLOCK positions, once a block
    actual_log_prob_code         square root of -log p of the token that really follows, in steps of ACTUAL_STEP

The head's softened probabilities and the tail's mass are right at any T >= 1; the sketch gives the shape of the tail. So
one cache serves every temperature and every schedule.

Two things make the codes small. Neighbouring positions share slow components (the topic), which the block means take
out of directions that would otherwise be rounded to zero everywhere. And a quantiser with a wide zero (rounding at 0.64
instead of 0.5) spends bits where the error falls most per bit.

Tried, and not built: a head size of each position's own. Offline, with the compact preset on 1,582 positions of
SmolLM2-135M that calibration did not see, the sizes (1 to 64, 7.4 on average) that leave the same sum of KL at T = 1
and 2 in the fewest bytes save 4.6 of 60.2 (7.6 %), sizes' own entropy counted; with the tokens that need it most in
place of the largest, 7.0 %. But they come from each position's KL at every size: the sketch expanded over the whole
vocabulary wherever it is captured. A larger head of one size with tokens chosen by need costs 3 % more than the
largest ones. A rule that a capture can afford was not measured, nor the gradient angle.

Shapes: N positions, V vocabulary, D width of the output layer's input, k head, r rank, G nodes, M blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.grouped_topk import largest
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.head_checks import check_distinct
from teachercache.targets.logits.kind import NOTHING, KindSettings, hidden_size
from teachercache.targets.logits.softened import Softened, Tail
from teachercache.targets.logits.tail import NODES, decode_nodes, node_sums, quantise_nodes, tail_at
from teachercache.targets.logits.tails.policies import TAIL_POLICIES
from teachercache.targets.logits.tails.policy import HEAD, MASS, SKETCH, TailContext, offered

if TYPE_CHECKING:
    from torch import Tensor

HEAD_STEP = 1 / 32  # of a logit
LEAST_HEAD_LOGIT = -2000.0  # relative to the largest; what 16 bits of steps hold
ACTUAL_STEP = 1 / 64  # of the square root of nats
MEAN_STEP = 0.05  # of a logit, root mean square over tokens by their probability
MEAN_BLOCK = 64  # positions
ROUNDING = 0.36  # fraction from which a magnitude is rounded up: 0.5 would be plain rounding
CENTROID_SHIFT = 0.025  # how far below |code| the mean of what was rounded to it lies; twice that for |code| = 1

Array = NDArray[Any]


SKETCH_PRESETS: dict[str, dict[str, Any]] = {
    # 59 and 108 bytes a position of SmolLM2-135M (tests/bench/codec_fidelity.py)
    "compact": {"k": 10, "rank": 320, "step": 0.16},
    "fine": {"k": 20, "rank": 384, "step": 0.1},
}


class HeadSketchConfig(KindSettings):
    """The largest logits exactly, the tail's mass at every temperature, and a low-rank sketch of the tail's shape."""

    kind: Literal["head+sketch"] = Field(
        "head+sketch", description="an exact head and a sketch of the tail: the default"
    )
    preset: Literal["compact", "fine"] = Field("compact", description="sets k, rank and step where they are not given")
    k: int = Field(0, ge=1, validate_default=False, description="largest logits kept exactly")
    rank: int | None = Field(
        0, ge=1, validate_default=False, description="directions of the sketch; a narrower model takes its width"
    )
    step: float | None = Field(
        0.0, gt=0, le=1000, validate_default=False, description="quantisation step in logits; smaller = larger"
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="instead of the preset's rank and step: the pair of fewest bytes whose KL(teacher ‖ stored), in nats, is "
        "at most this at T = 1 and 2; a rank or step that is given beside it stays",
    )
    calibration_positions: int = Field(
        16384, ge=64, description="positions that the sketch is fitted to, drawn from the whole corpus by content hash"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = SKETCH_PRESETS.get(values.get("preset", "compact"), {})
        if values.get("target_kl") is not None:
            preset = {**preset, "rank": None, "step": None}
        return {**preset, **values}

    @model_validator(mode="after")
    def _rank_and_step(self) -> HeadSketchConfig:
        if self.target_kl is None and (self.rank is None or self.step is None):
            raise ValueError("rank and step need values, or a target_kl by which calibration chooses them")
        return self

    def for_teacher(self, config: Any) -> dict[str, Any]:
        """As `KindSettings.for_teacher`: a sketch as wide as the model leaves nothing out."""
        settings, width = super().for_teacher(config), hidden_size(config)
        if settings["rank"] is not None and width is not None:
            settings["rank"] = min(settings["rank"], width)
        return settings

    @classmethod
    def left_open(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """As `KindSettings.left_open`: a target chooses both."""
        return ("rank", "step") if settings.get("target_kl") is not None else ()


@dataclass(frozen=True, eq=False)
class HeadSketch:
    """Settings of the kind, and the basis once there is one."""

    kind = "head+sketch"
    needs_calibration = True
    config = HeadSketchConfig
    preferred_tails: ClassVar[tuple[str, ...]] = ("sketch", "ghost", "uniform", "renormalise")

    k: int
    rank: int
    step: float
    vocabulary_size: int
    calibration_positions: int
    target_kl: float | None = None  # calibration chooses by it
    chosen: tuple[str, ...] = ()  # what it chooses: `rank`, `step`, which are 0 until then
    basis: SketchBasis | None = None

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], *, vocabulary_size: int, basis: SketchBasis | None = None
    ) -> HeadSketch:
        """Rebuild from a recipe's or manifest's settings; raises `RecipeError` when k leaves no tail."""
        if settings["k"] >= vocabulary_size:
            raise RecipeError(
                f"targets.logits.k is {settings['k']}, but the teacher's tokenizer has {vocabulary_size} tokens; "
                f"use a smaller k, or targets.logits.kind: top-k with k = {vocabulary_size}"
            )
        rank, step = settings["rank"], settings["step"]
        if basis is not None and (basis.vocabulary_size, basis.rank) != (vocabulary_size, rank or basis.rank):
            raise CacheDamaged(
                f"the sketch basis has {basis.rank} directions for {basis.vocabulary_size} tokens, the manifest says "
                f"{rank or basis.rank} for {vocabulary_size}; fetch the cache again"
            )
        if basis is not None:
            _check_basis(basis, settings["k"])
            if step is None and basis.step is None:
                raise CacheDamaged("neither the manifest nor the sketch basis has a step; fetch the cache again")
        found_rank, found_step = (0, 0.0) if basis is None else (basis.rank, basis.step or 0.0)
        return cls(
            k=settings["k"],
            rank=found_rank if rank is None else rank,
            step=found_step if step is None else step,
            vocabulary_size=vocabulary_size,
            calibration_positions=settings["calibration_positions"],
            target_kl=settings.get("target_kl"),
            chosen=tuple(name for name in ("rank", "step") if settings[name] is None),
            basis=basis,
        )

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        settings: dict[str, Any] = {
            "kind": self.kind, "k": self.k, "rank": self.rank, "step": self.step,
            "calibration_positions": self.calibration_positions,
        }  # fmt: skip
        # What a target leads to is known after calibration: it stands with the basis.
        target = {} if self.target_kl is None else {"target_kl": self.target_kl}
        return {**settings, **dict.fromkeys(self.chosen), **target}

    def with_basis(self, basis: SketchBasis) -> HeadSketch:
        """The kind, ready to capture and to read."""
        return self.from_settings(self.settings(), vocabulary_size=self.vocabulary_size, basis=basis)

    def describe(self) -> str:
        """One line for people."""
        known = {"rank": f"rank {self.rank}", "step": f"step {self.step:g}"}
        parts = [text for name, text in known.items() if self.basis is not None or name not in self.chosen]
        if self.target_kl is not None:
            parts.append(f"KL of at most {self.target_kl:g} nats")
        return f"{self.k} largest logits, and a sketch of the others ({', '.join(parts)}): any T >= 1"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        ids = "<u2" if self.vocabulary_size <= 2**16 else "<u4"
        runs = _runs(self.rank)
        return (
            Column(
                "head_ranks", ids, (self.k,), PCO, groups=_head_groups(self.k), within=(0, self.vocabulary_size - 1)
            ),
            Column("head_gaps", "<u2", (self.k - 1,), PCO, groups=_head_groups(self.k - 1)),
            Column("tail_nodes", "<i2", (len(NODES),), PCO, groups=(1,) * len(NODES)),
            Column("sketch_codes", "<i2", (self.rank,), PCO, groups=runs),
            Column("sketch_means", "<i2", (self.rank,), PCO, every=MEAN_BLOCK, groups=_coarse(runs)),
            Column("actual_log_prob_code", "<u2", (), PCO, groups=(1,)),
        )

    # ------------------------------------------------------------------ capture

    def capture(
        self,
        torch: ModuleType,
        logits_NV: Tensor,
        labels_N: Tensor,
        hidden_ND: Tensor | None = None,
        seeds_N: NDArray[np.uint64] | None = None,
        *,
        beside: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Array]:
        """Takes the targets of N positions while their logits are at hand; `finish` turns a row of them into columns.

        `logits_NV` are float32 [N, V >= vocabulary], overwritten; `hidden_ND` is what entered the output layer.
        """
        assert hidden_ND is not None
        basis = self._basis()
        logits_NV = logits_NV[:, : self.vocabulary_size]
        head_Nk, ids_Nk = largest(torch, logits_NV, self.k)
        largest_N1 = head_Nk[:, :1].clone()
        actual_N1 = logits_NV.gather(1, labels_N[:, None]) - largest_N1
        tail_NG = node_sums(torch, logits_NV.sub_(largest_N1), ids_Nk)
        head_Nk = (head_Nk - largest_N1).clamp_min(LEAST_HEAD_LOGIT)  # a token that is ruled out: -inf
        log_z_N = torch.logaddexp(head_Nk.exp().sum(-1).log(), tail_NG[:, 0])
        mean_D, analysis_Dr = basis.capturing_arrays(torch, hidden_ND.device)
        taken = {
            "head_ids": ids_Nk,
            "head_logits": head_Nk,
            "tail_nodes": tail_NG,
            "coefficients": (hidden_ND.float() - mean_D) @ analysis_Dr,
            "actual_log_prob": actual_N1[:, 0] - log_z_N,
        }
        return to_host(torch, {**taken, **beside})

    @staticmethod
    def is_usable(captured: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N]."""
        tall = [captured[name] for name in ("head_logits", "tail_nodes", "coefficients")]
        finite_N: NDArray[np.bool_] = np.logical_and.reduce([np.isfinite(array).all(-1) for array in tall])
        usable_N: NDArray[np.bool_] = finite_N & ~np.isnan(captured["actual_log_prob"])
        return usable_N

    def finish(self, captured: Mapping[str, Array]) -> dict[str, Array]:
        """One row's captured arrays, in order of positions, to its columns."""
        basis = self._basis()
        places_Nk = np.rint(captured["head_logits"] * (-1 / HEAD_STEP)).astype(np.int64)
        gaps_Nk = np.clip(np.diff(places_Nk, axis=1), 0, 65535).astype(np.uint16)
        means_Mr, codes_Nr = quantise_coefficients(captured["coefficients"], self.step)
        return {
            "head_ranks": basis.rank_of_token_V[captured["head_ids"]],
            "head_gaps": gaps_Nk,
            "tail_nodes": quantise_nodes(captured["tail_nodes"], _head_logits(gaps_Nk), basis.tail_weights_GF),
            "sketch_codes": codes_Nr,
            "sketch_means": means_Mr,
            "actual_log_prob_code": _code_log_prob(captured["actual_log_prob"]),
        }

    # ------------------------------------------------------------------ reading

    @property
    def tail_policies(self) -> tuple[str, ...]:
        """Names of what `softened` accepts."""
        return offered(self.preferred_tails, TAIL_POLICIES.values(), known=frozenset((HEAD, MASS, SKETCH)))

    @staticmethod
    def check_temperature(temperature: float) -> None:
        """Raise `CacheError` for T < 1."""
        tail_at(np.zeros((0, len(NODES))), temperature, tail_tokens=1)

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that a loss with this tail policy reads."""
        head = ("head_ranks", "head_gaps", "tail_nodes")
        return (*head, "sketch_codes", "sketch_means") if SKETCH in TAIL_POLICIES[tail].needs else head

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Raise `CacheDamaged` for a head that names a token twice; what is stored of its logits cannot rise."""
        if "head_ranks" in stored:
            check_distinct(stored["head_ranks"], name="head_ranks")

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """One row's columns, those that are there, as arrays ready for a batch, [N, …]:

        `head_ids` int32 [k], `head_logits` float32 [k] (the first is 0), `tail_nodes` float32 [G], `coefficients`
        float32 [r], `actual_log_prob` float32.
        """
        basis = self._basis()
        arrays: dict[str, Array] = {}
        if "head_ranks" in stored:
            arrays["head_ids"] = basis.token_of_rank_V[stored["head_ranks"]].astype(np.int32)
        if "head_gaps" in stored:
            arrays["head_logits"] = _head_logits(stored["head_gaps"])
        if "tail_nodes" in stored:
            arrays["tail_nodes"] = decode_nodes(stored["tail_nodes"], arrays["head_logits"], basis.tail_weights_GF)
        if "sketch_codes" in stored:
            arrays["coefficients"] = restore_coefficients(stored["sketch_means"], stored["sketch_codes"], self.step)
        if "actual_log_prob_code" in stored:
            arrays["actual_log_prob"] = -((stored["actual_log_prob_code"] * np.float32(ACTUAL_STEP)) ** 2)
        return arrays

    def softened(
        self, arrays: Mapping[str, Any], temperature: float, *, tail: str = "sketch", xp: ModuleType = np
    ) -> Softened:
        """The distribution at any T >= 1, from what `decoded` gives (numpy's or torch's, any device).

        Softening: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015. Raises `CacheError` for
        T < 1.
        """
        tail_N = tail_at(arrays["tail_nodes"], temperature, tail_tokens=self.vocabulary_size - self.k)
        scaled_Nk = arrays["head_logits"] / temperature
        log_z_N = xp.logaddexp(xp.log(xp.exp(scaled_Nk).sum(-1)), tail_N)
        softened = Softened(arrays["head_ids"], scaled_Nk - log_z_N[:, None], tail_N - log_z_N)

        def sketch() -> Tail:
            return self._basis().tail(arrays["coefficients"], temperature)

        return TAIL_POLICIES[tail].apply(softened, TailContext(self.vocabulary_size, temperature, sketch))

    def _basis(self) -> SketchBasis:
        if self.basis is None:
            raise CacheError("this kind of targets is read with the sketch basis in the cache's teacher/ folder")
        return self.basis


def _check_basis(basis: SketchBasis, k: int) -> None:
    weights, ranks = basis.tail_weights_GF.shape, len(basis.token_of_rank_V)
    if weights != (len(NODES), k + len(NODES)) or ranks != basis.vocabulary_size or basis.analysis_Dr.ndim != 2:
        raise CacheDamaged(f"the basis is none of a sketch with {k} largest logits; fetch the cache again")


def quantise_coefficients(coefficients_Nr: Array, step: float) -> tuple[Array, Array]:
    """Block means int16 [M, r] in steps of MEAN_STEP, and what is left of each position int16 [N, r] in steps."""
    means_Mr = np.empty((-(-len(coefficients_Nr) // MEAN_BLOCK), coefficients_Nr.shape[1]), dtype=np.int16)
    codes_Nr = np.empty(coefficients_Nr.shape, dtype=np.int16)
    for block, start in enumerate(range(0, len(coefficients_Nr), MEAN_BLOCK)):
        part = slice(start, start + MEAN_BLOCK)
        means_Mr[block] = _quantise(coefficients_Nr[part].mean(0), MEAN_STEP)
        codes_Nr[part] = _quantise(coefficients_Nr[part] - means_Mr[block] * np.float32(MEAN_STEP), step)
    return means_Mr, codes_Nr


def restore_coefficients(means_Mr: Array, codes_Nr: Array, step: float) -> Array:
    """Inverse of `quantise_coefficients`, float32 [N, r]: codes stand for the mean of what was rounded to them."""
    # -2, -1, 0, 1, 2 times CENTROID_SHIFT by the code, without a branch: reading a cache spends its time here.
    shift_Nr = np.clip(codes_Nr, -2, 2) - 3 * np.clip(codes_Nr, -1, 1)
    values_Nr = codes_Nr.astype(np.float32)
    values_Nr += shift_Nr * np.float32(CENTROID_SHIFT)
    values_Nr *= np.float32(step)
    for block, mean_r in enumerate(means_Mr):
        values_Nr[block * MEAN_BLOCK : (block + 1) * MEAN_BLOCK] += mean_r * np.float32(MEAN_STEP)
    return values_Nr


def _quantise(values: Array, step: float) -> Array:
    codes = np.sign(values) * np.floor(np.abs(values) / np.float32(step) + np.float32(ROUNDING))
    clipped: Array = np.clip(codes, -32768, 32767).astype(np.int16)
    return clipped


def _code_log_prob(log_prob_N: Array) -> Array:
    roots_N = np.sqrt(np.maximum(-log_prob_N.astype(np.float64), 0.0))
    return np.rint(np.minimum(roots_N / ACTUAL_STEP, 65535)).astype(np.uint16)


def _head_logits(gaps_Nk: Array) -> Array:
    """Gaps [N, k - 1] to logits relative to the largest, float32 [N, k]."""
    logits_Nk = np.zeros((len(gaps_Nk), gaps_Nk.shape[1] + 1), dtype=np.float32)
    np.cumsum(gaps_Nk, axis=1, dtype=np.float32, out=logits_Nk[:, 1:])
    logits_Nk *= np.float32(-HEAD_STEP)
    return logits_Nk


def _head_groups(width: int) -> tuple[int, ...]:
    """The first few have a distribution of their own."""
    return (1,) * width if width <= 4 else (1, 1, 2, width - 4)


def _runs(rank: int) -> tuple[int, ...]:
    """Runs of directions with a similar spread: it falls by a constant factor from run to run."""
    groups, start = [], 0
    while start < rank:
        groups.append(min(rank - start, max(1, start // 2)))
        start += groups[-1]
    return tuple(groups)


def _coarse(groups: tuple[int, ...]) -> tuple[int, ...]:
    """Fewer tables for a column with few entries."""
    head = sum(groups[: len(groups) // 2])
    return (head, sum(groups) - head) if head else groups
