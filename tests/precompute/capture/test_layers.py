"""Layers that recipes ask for: numbers by rule, refusals in a line, and caches that hold them whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.forgery import sign
from teachercache.cache import Cache, verify
from teachercache.cache.inspection import describe, describe_row
from teachercache.config import parse_recipe
from teachercache.errors import CacheDamaged, ModelError, RecipeError
from teachercache.evaluation.fidelity import run_fidelity
from teachercache.precompute.capture.plan import make_plan
from teachercache.targets.layers.settings import LayerChoice, numbered

from builders import build_cache, tiny_cache, tiny_recipe, tiny_teacher
from tiny_models import model_of

TARGETS: dict[str, Any] = {
    "logits": {"kind": "top-k", "k": 8},
    "hidden": {"layers": [0, 2], "step": 0.05},
    "attention": {"layers": [2, 4]},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("made") / "teacher", layers=4)


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cache"), teacher=teacher, targets=TARGETS)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((5, 0, 12), (0, 5, 12)),
        ({"every": 5}, (5, 10)),
        ({"first": 3}, (1, 2, 3)),
        ({"last": 2}, (11, 12)),
        ({"uniform": 5}, (2, 5, 7, 10, 12)),
        ({"uniform": 1}, (12,)),
    ],
)
def test_layers_are_chosen_by_number_or_rule(choice: Any, expected: tuple[int, ...]) -> None:
    layers = LayerChoice.model_validate(choice) if isinstance(choice, dict) else choice
    assert numbered("key", layers, count=12, first=0) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"hidden": {"layers": [5]}},
            r"targets.hidden.layers: there is no layer 5; .* layers 0 \(the embeddings\) to 4",
        ),
        (
            {"attention": {"layers": [0]}},
            "targets.attention.layers: there is no layer 0; the teacher has layers 1 to 4",
        ),
        ({"hidden": {"layers": {"last": 9}}}, "targets.hidden.layers: last is 9, but the teacher has 4 blocks"),
        ({"hidden": {"layers": [1, 1]}}, "targets.hidden.layers: a layer is there twice"),
    ],
)
def test_layers_that_are_not_there_are_refused_before_anything_runs(
    teacher: Path, tmp_path: Path, targets: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(tiny_recipe(tmp_path, teacher=teacher, targets=targets))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("hidden", {"layers": [1], "codec": "bf16", "step": 0.1}, "codec bf16 has no step"),
        ("attention", {"layers": [1], "step": 0.1}, "`targets.attention.step` is of kind: queries-keys; leave it out"),
        (
            "attention",
            {"layers": [1], "kind": "maps", "calibration_positions": 100},
            "`targets.attention.calibration_positions` is of kind: queries-keys",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(section: str, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"cache": "c", "targets": {section: settings}}, origin="tests")


def test_rows_that_no_reader_takes_are_refused_before_they_are_computed(teacher: Path, tmp_path: Path) -> None:
    longer = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**21}))
    layers = {"logits": {"kind": "top-k", "k": 8}, "hidden": {"layers": [0, 1, 2, 3, 4]}}
    sections = {"teacher": longer, "targets": layers, "sequence": {"length": 2**21}}
    with pytest.raises(RecipeError, match=r"a row of sequence.length 2097152 would take 1\.\d GiB .* at most 1; lower"):
        make_plan(tiny_recipe(tmp_path, **sections))


def test_two_rules_at_once_are_refused() -> None:
    data = {"cache": "c", "targets": {"hidden": {"layers": {"first": 2, "last": 2}}}}
    with pytest.raises(RecipeError, match="choose by one rule: every, first, last or uniform"):
        parse_recipe(data, origin="tests")


def test_a_cache_with_layers_is_whole_and_says_what_it_holds(cache: Path) -> None:
    assert verify(cache) == []
    opened = Cache.open(cache)
    hidden = opened.targets.hidden
    assert hidden is not None and hidden.layers == (0, 1, 2, 3)  # 1 and 3 enter the blocks whose attention is kept
    shown = describe(opened)
    assert set(shown["bytes_per_position"]) == {"logits", "boundary_mass", "hidden", "tokens", "total"}
    files = [shown["read_by"][section]["layers"] for section in ("hidden", "attention")]
    assert shown["targets"]["attention"]["layers"] == [2, 4] and len(set(files)) == 2
    assert all(file.startswith("teacher/layers-") for file in files)
    row = describe_row(opened, "train:0")
    assert row["tokens"][0]["target"]["top"]
    card = (cache / "README.md").read_text()
    assert "hidden states of layers 0, 1, 2, 3 (32 channels, int8, step 0.05)" in card
    assert "attention of blocks 2, 4 (4 heads, rebuilt from hidden states)" in card


def test_fidelity_reports_layers(cache: Path, teacher: Path) -> None:
    result = run_fidelity(Cache.open(cache), teacher=str(teacher), rows=6, temperatures=(1.0,))
    assert set(result["hidden_cosine"]) == set(result["hidden_cosine_centred"]) == {"0", "1", "2", "3"}
    assert all(0.999 < value < 1 for value in result["hidden_cosine"].values())
    assert set(result["attention_kl"]) == {"2", "4"}
    assert all(0 < value < 0.02 for value in result["attention_kl"].values())


def test_a_unit_that_is_made_again_is_the_same_file(teacher: Path, tmp_path: Path, cache: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=teacher, targets=TARGETS)
    build_cache(recipe, units=1)
    build_cache(recipe)
    again = tmp_path / "cache"
    files = sorted(path.relative_to(cache) for path in cache.rglob("*.arrow"))
    assert {file.parent.as_posix() for file in files} == {"shards", "targets/hidden"} and len(files) > 2 * 2
    for file in files:
        assert (again / file).read_bytes() == (cache / file).read_bytes()


def test_logits_alone_are_read_without_layers(cache: Path) -> None:
    opened = Cache.open(cache)
    row = opened.read_row("train", 0, columns=opened.logit_columns)
    assert not [name for name in row.targets if name.startswith("hidden")]


def test_a_manifest_without_its_layer_file_is_refused(cache: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "copied"))
    sign(copied, lambda data: data["read_by"].pop("attention"))
    with pytest.raises(CacheDamaged, match="the manifest names no layer file"):
        Cache.open(copied).read_row("train", 0)


def test_attention_that_cannot_be_rebuilt_is_refused_before_anything_is_captured(tmp_path: Path) -> None:
    from builders import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model_of("gpt2", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="store its attention with targets.attention.kind: queries-keys"):
        build_cache(tiny_recipe(tmp_path / "a", teacher=tmp_path / "gpt2", targets={"attention": {"layers": [2]}}))
    kept = build_cache(
        tiny_recipe(
            tmp_path / "b",
            teacher=tmp_path / "gpt2",
            targets={"attention": {"layers": [2], "kind": "queries-keys", "values": True}},
        )
    )
    row = Cache.open(kept).read_row("train", 0)
    for name in ("query_2", "key_2", "value_2"):
        assert row.targets[name].shape == (row.row.length, 32)
    assert np.abs(row.targets["query_2"]).max() > 20


@pytest.mark.parametrize("codec", ["bf16", "projected"])
def test_every_codec_makes_a_cache(teacher: Path, tmp_path: Path, codec: str) -> None:
    made = tiny_cache(tmp_path, teacher=teacher, targets={"hidden": {"layers": [3], "codec": codec}})
    result = run_fidelity(Cache.open(made), teacher=str(teacher), rows=4, temperatures=(1.0,))
    assert verify(made) == []
    assert result["hidden_cosine"]["3"] > (0.9999 if codec == "bf16" else 0.97)
