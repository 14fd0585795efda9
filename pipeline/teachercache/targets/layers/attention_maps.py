"""Attention as maps: what each query gives to each key it sees, a byte each, quadratic in the length of a row.

    map_{layer}        [h] for each pair       code c = round(255 · p^(1/4)) of the share p, less that of the query before
    with `top`:
    map_{layer}        [m + 1, h] for each token   codes of the m largest shares, by distance, then of what all others have
    map_keys_{layer}   [m, h] for each token       how far back their keys are: the first, then what is added

A pair is a query and a key that it can see: of its segment, up to itself; pairs are in the order of queries, then keys. A
share is (c / 255)^4, and (1/4 / 255)^4 for c = 0, over their sum, so that nothing that is seen has none.

Why the fourth root: a share's relative error is 2/c at most, so that KL(teacher ‖ stored) is near 10^-5 · Σ √p of a query:
it grows with the square root of the number of keys (tests/bench/layer_fidelity.py). Of a square root it would be near
10^-6 · 2.6 · keys, and a code of 0 would stand for every share below 4 · 10^-6.

Why differences: a query gives a key nearly what the query before gave it. zstd comes near an entropy coder here, and has no
tables that bound what a shard can hold.

With `top` that many keys are as near, and all others of a query alike: what is small in a query's attention is lost, so that
such maps are far from the original in KL.

Shapes: S tokens, P pairs, C queries of a chunk, H heads of the teacher, h heads that are stored, m keys that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.layers.attention import HeadShape, log_attention, sees
from teachercache.targets.layers.claims import AttentionClaim, LayerClaim, Number
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.layers.settings import BLOCKS, AttentionSettings, Layers, LayerSettings, TeacherShape
from teachercache.targets.layers.stored_maps import LEVELS, LargestShares, Maps

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
MOST_CODES = 2**29  # of a row: all layers' squares [S, S, h]; half of them are stored, in one record batch
MOST_DISTANCE = 2**16 - 1
CHUNK_BYTES = 64 * 2**20  # of one map [H, C, S] while it is captured
PAIR_BYTES = 0.66  # of a code on disk
KEY_BYTES = 1.4  # of a code and its key


class MapsConfig(AttentionSettings):
    """Attention maps, quadratic in a row's length."""

    kind: Literal["maps"] = Field("maps", description="what each query gives to each key, quadratic in a row's length")
    layers: Layers = Field(description=BLOCKS)
    top: int | None = Field(None, ge=1, le=1024, description="keys that are kept of each query; default: all of them")
    heads: int | None = Field(
        None, ge=1, description="average groups of the teacher's heads, as many as the student's; default: all"
    )

    def for_teacher(self, teacher: TeacherShape, *, longest: int) -> dict[str, Any]:
        """See `LayerSettings`. Raises `RecipeError` for maps that are too large, too."""
        shared = teacher.attention(self.layers)
        teacher_heads = shared["heads"]
        heads = teacher_heads if self.heads is None else self.heads
        if teacher_heads % heads:
            raise RecipeError(
                f"targets.attention.heads is {heads}, but the teacher's {teacher_heads} heads cannot be averaged in as many "
                "equal groups; choose a divisor, or leave it out: students of any head count mix heads themselves"
            )
        try:
            check_length(longest, heads=heads, layers=len(shared["layers"]), top=self.top)
        except ValueError as error:
            raise RecipeError(
                f"targets.attention: {error}; store fewer layers, fewer heads or the `top` keys of each query, make "
                "sequence.length smaller, or use kind: relations, which is linear in it"
            ) from None
        return {**shared, "heads": heads, "teacher_heads": teacher_heads, "top": self.top, "longest": longest}


class MapsClaim(AttentionClaim):
    """Settings in a manifest."""

    teacher_heads: Number
    top: int | None = Field(ge=1, le=1024)

    @property
    def all_heads(self) -> int:
        """Heads of the teacher."""
        return self.teacher_heads

    def check(self, section: str, targets: Mapping[str, Any], *, longest: int) -> None:
        """See `LayerClaim`."""
        super().check(section, targets, longest=longest)
        check_length(longest, heads=self.heads, layers=len(self.layers), top=self.top)


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Settings of the kind, and the layer file's shapes once there are any. `longest` (tokens of a row) is for planning."""

    kind: ClassVar[str] = "maps"
    section: ClassVar[str] = "attention"
    config: ClassVar[type[LayerSettings]] = MapsConfig
    claim: ClassVar[type[LayerClaim]] = MapsClaim
    keeps_vectors: ClassVar[bool] = False
    values: ClassVar[bool] = False
    holds_sinks: ClassVar[bool] = False
    from_hidden: ClassVar[bool] = False
    hidden_layers: tuple[int, ...] = ()

    layers: tuple[int, ...] = ()
    heads: int = 0  # that are stored
    teacher_heads: int = 0
    key_heads: int = 0
    head_width: int = 0
    width: int = 0
    blocks: int = 0  # of the teacher
    top: int | None = None
    longest: int = 0
    shapes: Mapping[int, HeadShape] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AttentionMaps:
        """Rebuild from a manifest's settings."""
        stored = {name: settings[name] for name in _SETTINGS}
        return cls(layers=tuple(settings["layers"]), **stored, longest=settings.get("longest", 0))

    @classmethod
    def why_unreadable(cls, settings: Mapping[str, Any]) -> str | None:
        """Nothing that it says can be of a later version."""
        return None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "layers": list(self.layers), **{name: getattr(self, name) for name in _SETTINGS}}

    def describe(self) -> str:
        """One line for people."""
        kept = "all keys" if self.top is None else f"the {self.top} largest keys of each query"
        blocks = ", ".join(map(str, self.layers))
        return f"attention maps of blocks {blocks} ({self.heads} heads, {kept})"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Blocks whose attention is recorded."""
        return self.layers

    @property
    def columns(self) -> tuple[Column, ...]:
        """A column for each layer, two with `top`."""
        return tuple(column for layer in self.layers for column in self._columns(layer))

    def _columns(self, layer: int) -> tuple[Column, ...]:
        if self.top is None:
            return (Column(f"map_{layer}", "|u1", (self.heads,), of="pair"),)
        # Shares of the nearest keys, and those far away, are spread in their own ways: a table for each place.
        codes, keys = ((count, self.heads) for count in (self.top + 1, self.top))
        return (
            Column(f"map_{layer}", "<u2", codes, PCO, groups=(self.heads,) * codes[0], of="token", within=(0, LEVELS)),
            Column(f"map_keys_{layer}", "<u2", keys, PCO, groups=(self.heads,) * keys[0], of="token"),
        )

    @property
    def token_bytes(self) -> float:
        """Bytes of a token in a row of `longest` tokens, for which half of them are keys; or of those that are kept."""
        keys = PAIR_BYTES * (self.longest + 1) / 2 if self.top is None else KEY_BYTES * self.top
        return len(self.layers) * self.heads * keys

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """None: the layer file says what windows blocks have."""
        return {}

    def with_layers(self, layers: LayerFile) -> AttentionMaps:
        """The kind, ready to capture and to read; raises `ValueError` for attention of other heads."""
        wanted = (self.teacher_heads, self.key_heads, self.head_width)
        return replace(self, shapes=layers.head_shapes(self.layers, wanted))

    def capture(self, torch: ModuleType, row: RowActivations) -> dict[str, Array]:
        """Codes of one row, [P, h]; or with `top` [S, m + 1, h] and distances [S, m, h]. Raises `ValueError` for what is no
        number."""
        segment_BS = torch.from_numpy(np.asarray(row.segment_S))[None]
        captured: dict[str, Array] = {}
        for layer in self.layers:
            taken = self._pairs if self.top is None else self._largest
            arrays = taken(torch, layer, row, segment_BS.to(row.queries[layer].device))
            captured |= {column.name: array for column, array in zip(self._columns(layer), arrays, strict=True)}
        return captured

    def _chunks(
        self, torch: ModuleType, layer: int, row: RowActivations, segment_BS: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """(first query, probabilities [h, C, S]) after one another."""
        shape, queries_HSE, keys_KSE = row.shapes[layer], row.queries[layer], row.keys[layer]
        length = segment_BS.shape[1]
        chunk = max(1, CHUNK_BYTES // (4 * self.teacher_heads * length))
        for start in range(0, length, chunk):
            part = slice(start, min(start + chunk, length))
            sees_BCS = sees(torch, segment_BS, window=shape.window, queries=part)
            log_BHCS = log_attention(
                queries_HSE[None, :, part], keys_KSE[None], sees_BCS, scaling=shape.scaling, softcap=shape.softcap
            )
            shares_HCS = log_BHCS[0].exp()
            if not bool(shares_HCS.isfinite().all()):
                raise ValueError(f"the teacher's attention of block {layer} is not finite")
            yield start, shares_HCS.unflatten(0, (self.heads, -1)).mean(1)

    def _pairs(self, torch: ModuleType, layer: int, row: RowActivations, segment_BS: Tensor) -> tuple[Array]:
        before_h1S, parts = None, []
        for start, shares_hCS in self._chunks(torch, layer, row, segment_BS):
            codes_hCS = _coded(torch, shares_hCS)
            before_h1S = torch.zeros_like(codes_hCS[:, :1]) if before_h1S is None else before_h1S
            # Modulo 256. A key's first query is itself: what stands before is zero, as between segments.
            differences_hCS = codes_hCS - torch.cat([before_h1S, codes_hCS[:, :-1]], dim=1)
            before_h1S = codes_hCS[:, -1:]
            pairs_CS = sees(torch, segment_BS, window=None, queries=slice(start, start + codes_hCS.shape[1]))[0]
            parts.append(differences_hCS.permute(1, 2, 0)[pairs_CS].cpu().numpy())
        return (np.concatenate(parts),)

    def _largest(self, torch: ModuleType, layer: int, row: RowActivations, segment_BS: Tensor) -> tuple[Array, Array]:
        assert self.top is not None
        codes, keys = [], []
        for start, shares_hCS in self._chunks(torch, layer, row, segment_BS):
            count, length = shares_hCS.shape[1:]
            largest_hCm, key_hCm = shares_hCS.topk(min(self.top, length), dim=-1)
            code_hCm = _coded(torch, largest_hCm)
            query_C1 = torch.arange(start, start + count, device=key_hCm.device)[:, None]
            # By distance; those without a share come last: they are none.
            distance_hCm = (query_C1 - key_hCm).masked_fill(code_hCm == 0, length)
            distance_hCm, order_hCm = distance_hCm.sort(dim=-1)
            code_hCm = code_hCm.gather(-1, order_hCm)
            kept_hCm = code_hCm > 0
            rest_hC1 = (shares_hCS.sum(-1) - (largest_hCm.gather(-1, order_hCm) * kept_hCm).sum(-1))[..., None]
            room = (0, self.top - code_hCm.shape[-1])
            code_hCm, distance_hCm = (
                torch.nn.functional.pad(values, room) for values in (code_hCm, distance_hCm * kept_hCm)
            )
            step_hCm = distance_hCm.diff(dim=-1, prepend=torch.zeros_like(distance_hCm[..., :1])).clamp_min(0)
            codes.append(torch.cat([code_hCm, _coded(torch, rest_hC1.clamp(0, 1))], dim=-1).permute(1, 2, 0))
            keys.append(step_hCm.permute(1, 2, 0))
        return tuple(torch.cat(parts).cpu().numpy().astype(np.uint16) for parts in (codes, keys))

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Raise `CacheDamaged` where a key lies before the row."""
        for layer in self.layers if self.top is not None else ():
            steps_Smh = stored.get(f"map_keys_{layer}")
            if steps_Smh is not None and ((_distances(steps_Smh) > np.arange(len(steps_Smh))[:, None, None]).any()):
                raise CacheDamaged(f"column map_keys_{layer}: a key lies before the first token of its row")

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the arrays of the columns that are there: differences of codes, uint8 [P, h]; with `top` codes uint8
        [S, m + 1, h] and distances int32 [S, m, h]."""
        decoded = {}
        for layer in self.layers:
            codes, keys = f"map_{layer}", f"map_keys_{layer}"
            if codes in stored:
                decoded[codes] = stored[codes].astype(np.uint8)
            if keys in stored:
                decoded[keys] = _distances(stored[keys]).astype(np.int32)
        return decoded

    def columns_of(self, layer: int) -> tuple[str, ...]:
        """Columns that a block's attention is read from."""
        return tuple(column.name for column in self._columns(layer))

    def stored_heads(
        self, torch: ModuleType, layer: int, arrays: Mapping[str, Tensor], position_BS: Tensor
    ) -> Maps | LargestShares:
        """Maps of a block, from `arrays`: what is decoded of `columns_of`, as [B, S, S, h], or with `top` as [B, S, …]."""
        if layer not in self.shapes:
            raise CacheError("attention is read with the layer file in the cache's teacher/ folder")
        window = self.shapes[layer].window
        if self.top is None:
            return Maps.of(arrays[f"map_{layer}"], window=window)
        return LargestShares(arrays[f"map_{layer}"], arrays[f"map_keys_{layer}"], position_BS, window=window)


_SETTINGS = ("heads", "teacher_heads", "key_heads", "head_width", "width", "blocks", "top")


def check_length(length: int, *, heads: int, layers: int, top: int | None) -> None:
    """Raise `ValueError` for maps that are larger than a row's columns, or its squares in a batch, can be."""
    codes = length * length * heads * layers
    if top is None and codes > MOST_CODES:
        raise ValueError(
            f"maps of {layers} blocks with {heads} heads and {length} tokens have {codes} places, at most {MOST_CODES} are "
            "possible"
        )
    if top is not None and length > MOST_DISTANCE + 1:
        raise ValueError(f"the keys of {length} tokens are more than {MOST_DISTANCE} apart")


def _coded(torch: ModuleType, shares: Tensor) -> Tensor:
    return (shares.sqrt().sqrt() * LEVELS).round().to(torch.uint8)


def _distances(steps_Smh: Array) -> Array:
    return np.cumsum(steps_Smh, axis=1, dtype=np.int64)
