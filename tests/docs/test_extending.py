"""The page on extending: its blocks run, and what they add is captured, trained from and refused as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache.forgery import sign
from teachercache import Cache, DistillationTrainer, ObjectiveConfig
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.verify import verify
from teachercache.cli import COMMANDS, app
from teachercache.config import TeachersConfig, parse_recipe
from teachercache.config.layer_losses import LAYER_LOSSES
from teachercache.errors import CacheDamaged, CacheError, ModelError, RecipeError
from teachercache.objective.ensemble import EnsembleMember, FusedTeacher, TeacherWeights
from teachercache.objective.objective_schedule import ObjectiveSchedule
from teachercache.registry import Registry
from teachercache.schedules import SCHEDULES
from teachercache.targets import KINDS, TAIL_POLICIES
from teachercache.targets.layers.kinds import LAYER_KINDS
from teachercache.targets.logits.tails.policy import HEAD, MASS, offered
from teachercache.teacher import BACKENDS

from builders import build_cache, tiny_cache, tiny_recipe, tiny_teacher
from pages import ROOT, blocks
from target_kinds import as_tensors, stored_arrays, walk_through_a_cache

PAGE = ROOT / "docs" / "design" / "extending.md"


@pytest.fixture(scope="module")
def added() -> Iterator[dict[str, Any]]:
    """Names that the page's blocks define, each run by itself; afterwards nothing of them is on any list."""
    names: dict[str, Any] = {}
    for block in blocks(PAGE, "python"):
        alone: dict[str, Any] = {"__name__": "extension"}
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), alone)
        names |= alone
    yield names
    lists: dict[str, Registry[Any]] = {
        "rounded": KINDS, "by-id": TAIL_POLICIES, "norms": LAYER_LOSSES, "scaled": LAYER_KINDS, "halving": SCHEDULES,
        "one-by-one": BACKENDS,
        "task": SCHEDULES, "longest-row": COMMANDS,
    }  # fmt: skip
    for name, registry in lists.items():
        registry.remove(name)


def test_a_kind_from_outside_is_captured_and_learned_from(added: dict[str, Any], tmp_path: Path) -> None:
    settings = {"kind": "rounded", "step": 0.01}
    cache, divergence = walk_through_a_cache(tmp_path, settings, temperature=3.0)
    assert type(cache.kind) is added["Rounded"] and cache.kind.settings() == settings
    exact = walk_through_a_cache(tmp_path / "full", {"kind": "full", "dtype": "float32"}, temperature=3.0)[1]
    torch.testing.assert_close(divergence, exact, rtol=1e-3, atol=0.0)
    KINDS.remove("rounded")
    with pytest.raises(CacheError, match="stores logits of kind 'rounded', this version reads top-k"):
        Cache.open(cache.name).kind  # noqa: B018
    KINDS.register(added["Rounded"])


def test_keys_of_parts_from_outside_are_checked_as_all_are(added: dict[str, Any]) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "unknown key `targets.logits.stepp`; did you mean `step`?": {"targets": {"logits": {"kind": "rounded", "stepp": 1}}},
        "`targets.logits.step`: input should be less than": {"targets": {"logits": {"kind": "rounded", "step": 2}}},
        "`objective.layers.0`: heads means nothing to norms": {"objective": {"layers": [{"match": "norms", "heads": "mix"}]}},
        "`objective.layers.0.power`: input should be greater": {"objective": {"layers": [{"match": "norms", "power": 0}]}},
        "did you mean `power`?": {"objective": {"layers": [{"match": "norms", "powr": 3}]}},
        "unknown key `targets.hidden.mot`; did you mean `most`?": {
            "targets": {"hidden": {"kind": "scaled", "layers": [1], "mot": 3}}
        },
        "`targets.hidden.kind`: input should be 'hidden'": {"targets": {"hidden": {"kind": "scald", "layers": [1]}}},
        "input should be 'auto', 'ghost'": {"objective": {"tail": "by-ids"}},
        "unknown key `objective.temperature.ende`; did you mean `end`?": {
            "objective": {"temperature": {"schedule": "halving", "start": 4, "ende": 1}}
        },
        "temperature must be above 0 and at most 100, and becomes -0.875": {
            "objective": {"temperature": {"schedule": "halving", "start": 1, "end": -1}}
        },
        "`objective.alpha.floor`: input should be greater": {"objective": {"alpha": {"balance": "task", "floor": -1}}},
        "whose `schedule` is one of 'linear'": {"objective": {"temperature": {"balance": "task"}}},
    }  # fmt: skip
    for message, sections in wrong.items():
        with pytest.raises(RecipeError) as caught:
            parse_recipe({"cache": "c", **sections}, origin="recipe.yaml")
        assert message in str(caught.value)


def test_a_tail_policy_from_outside_gives_each_token_its_share(added: dict[str, Any]) -> None:
    kind = KINDS["top-k"].from_settings({"k": 2, "temperatures": [1.0], "dtype": "float32"}, vocabulary_size=5)
    assert kind.tail_policies == ("ghost", "uniform", "renormalise", "by-id")
    arrays = {
        "head_ids": np.array([[1, 4]]),
        "head_logits": np.zeros((1, 2), np.float32),
        "tail_log_partition": np.zeros((1, 1), np.float32),  # as much mass as one token of the head
    }
    shares = np.array([1, 1 / 3, 1 / 4])  # of the ids 0, 2 and 3
    third = np.float64(1 / 3)
    expected = third * np.array([shares[0], 0, shares[1], shares[2], 0]) / shares.sum() + third * np.array(
        [0, 1, 0, 0, 1]
    )
    for given, xp in ((arrays, np), ({name: torch.from_numpy(values) for name, values in arrays.items()}, torch)):
        dense_NV = np.exp(np.asarray(kind.softened(given, 1.0, tail="by-id", xp=xp).dense()))
        np.testing.assert_allclose(dense_NV[0], expected, rtol=1e-5)


def test_a_line_in_the_list_of_policies_is_enough(added: dict[str, Any]) -> None:
    policies = (TAIL_POLICIES["sketch"], added["ById"](), TAIL_POLICIES["ghost"])
    assert offered(("ghost",), policies, known=frozenset((HEAD, MASS))) == ("ghost", "by-id")


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
def test_a_tail_policy_from_outside_spreads_the_tails_of_several_teachers(added: dict[str, Any], fusion: str) -> None:
    """Against what each teacher says of every token by itself, as in an ensemble of the package's own policies."""
    V, N = 40, 7
    kind = KINDS["top-k"].from_settings({"k": 4, "temperatures": [1.0, 2.0], "dtype": "float32"}, vocabulary_size=V)
    drawn = torch.Generator().manual_seed(0)
    logits = [torch.randn(N, V, generator=drawn) * 2 for _ in range(2)]
    stored = [as_tensors(stored_arrays(kind, logits_NV)) for logits_NV in logits]
    teachers = FusedTeacher(
        [EnsembleMember(kind, name) for name in "ab"],
        TeachersConfig(caches=[{"cache": "b"}], fusion=fusion),
        objective=ObjectiveConfig(tail="by-id"), prior=(0.25, 0.75), shared=TeacherWeights(2),
    )  # fmt: skip
    assert teachers.tails == ("by-id", "by-id")
    targets = {**stored[0], **{f"teacher1/{name}": values for name, values in stored[1].items()}}
    targets |= {"teacher1/at": torch.arange(N), "teacher1/has": torch.ones(N, dtype=torch.bool)}
    fused = teachers.softened(targets, 2.0, like=torch.empty(0), dtype=torch.float32)
    each = [kind.softened(arrays, 2.0, tail="by-id", xp=torch).dense() for arrays in stored]
    shares = each[0].exp() * 0.25 + each[1].exp() * 0.75
    expected = shares if fusion == "arithmetic" else (each[0] * 0.25 + each[1] * 0.75).softmax(-1)
    torch.testing.assert_close(fused.dense().exp(), expected, rtol=1e-5, atol=1e-7)


def test_a_student_learns_by_a_policy_and_a_loss_from_outside(added: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_cache(tmp_path, targets={"logits": {"kind": "top-k", "k": 8}, "hidden": {"layers": [1, 2]}})
    config = {
        "alpha": {"schedule": "halving", "start": 0.9, "end": 0.5},
        "tail": "by-id",
        "layers": [{"match": "norms", "power": 1.5, "pairs": {1: 2}, "centred": False}],
    }
    student = tiny_teacher(tmp_path / "student", seed=5, layers=1)
    norms = trained(tmp_path, Cache.open(path), config, student=student)["norms"]
    assert len(norms) == 12 and norms[-1] < norms[0]


def trained(folder: Path, cache: Cache, objective: dict[str, Any], *, student: Path) -> dict[str, list[float]]:
    """Logged values of a dozen steps, by name."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        cache=cache,
        objective=ObjectiveConfig.model_validate(objective),
        args=TrainingArguments(
            str(folder / "run"), max_steps=12, learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True
        ),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in history] for name in history[0]}


def test_a_kind_of_hidden_states_from_outside_is_stored_checked_and_learned_from(
    added: dict[str, Any], tmp_path: Path
) -> None:
    hidden = {"kind": "scaled", "layers": [1, 2]}
    targets = {"logits": {"kind": "top-k", "k": 8}, "attention": {"layers": [3]}}
    teacher = tiny_teacher(tmp_path / "teacher", layers=3)
    path = tiny_cache(tmp_path / "scaled", teacher=teacher, targets={**targets, "hidden": hidden})
    exact = tiny_cache(tmp_path / "exact", teacher=teacher, targets={**targets, "hidden": {**hidden, "kind": "hidden"}})
    assert verify(path) == []
    cache, other = Cache.open(path), Cache.open(exact)
    assert type(cache.targets.hidden) is added["Scaled"] and cache.targets.settings()["hidden"]["kind"] == "scaled"
    rows = [opened.targets.decoded(opened.read_row("train", 0).targets) for opened in (cache, other)]
    for name in ("hidden_1", "hidden_2"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], atol=0.2 * float(np.abs(rows[1][name]).mean()))
    config = {"layers": [{"match": "hidden-mse", "pairs": {1: 2}}, {"match": "attention-kl", "pairs": {1: 3}}]}
    losses = trained(tmp_path, cache, config, student=tiny_teacher(tmp_path / "student", seed=5, layers=1))[
        "hidden-mse"
    ]
    assert losses[-1] < losses[0]
    sign(path, lambda data: data["targets"]["hidden"].update(most=0.0))
    with pytest.raises(CacheDamaged, match="most: Input should be greater than 0"):
        Cache.open(path)
    LAYER_KINDS.remove("scaled")
    with pytest.raises(CacheError, match="hidden of kind 'scaled', this version reads hidden; .* or the extension"):
        Cache.open(path).targets.check_known("hidden")
    LAYER_KINDS.register(added["Scaled"])


def test_a_schedule_from_outside_sets_temperatures_weights_and_alpha(added: dict[str, Any]) -> None:
    halving = {"schedule": "halving", "start": 5, "end": 1, "halvings": 2}
    objective = {"temperature": halving, "alpha": {**halving, "start": 1, "end": 0}}
    recipe = parse_recipe(
        {"cache": "c", "objective": objective, "phases": [{"name": "a", "share": 1}]}, origin="r.yaml"
    )
    again = ObjectiveConfig.model_validate(recipe.objective.model_dump(mode="json"))
    assert again == recipe.objective and type(again.temperature) is added["HalvingSchedule"]
    schedule = ObjectiveSchedule(again, steps=10)
    assert [schedule.at(step).temperature for step in (0, 5, 10)] == [5, 3, 2]
    assert [schedule.at(step).alpha for step in (0, 5, 10)] == [1, 0.5, 0.25]
    assert set(schedule.schedule_range.temperatures) >= {5, 2} and schedule.changes and not schedule.adapts


def test_a_balance_from_outside_follows_the_losses(added: dict[str, Any]) -> None:
    config = ObjectiveConfig.model_validate({"alpha": {"balance": "task", "start": 0.9}})
    one, other = (ObjectiveSchedule(config, steps=10) for _ in range(2))
    assert one.adapts and one.at(0).alpha == 0.9
    one.update(0, distillation=1.0, ce=2.25)
    assert one.at(1).alpha == 0.25 and one.state_dict() == {"alpha": {"value": 0.25}}
    other.load_state_dict(one.state_dict())
    assert other.at(1).alpha == 0.25
    with pytest.raises(RecipeError, match="a balance belongs into objective.alpha"):
        parse_recipe(
            {"cache": "c", "phases": [{"name": "a", "share": 1, "alpha": {"balance": "task"}}]}, origin="r.yaml"
        )


def test_a_command_from_outside_is_listed_and_runs(added: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_cache(tmp_path)
    cache = Cache.open(path)
    told = CliRunner().invoke(app, ["longest-row", str(path), "--json"])
    lengths = [cache.read_row("train", index).row.length for index in range(cache.rows_of("train"))]
    assert told.exit_code == 0 and json.loads(told.stdout)["tokens"] == max(lengths)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "longest-row" in shown and "Say which row of a cache has most tokens." in shown
    assert "--split" in CliRunner().invoke(app, ["longest-row", "--help"], color=False).output
    missing = CliRunner().invoke(app, ["longest-row", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "error:" in missing.stderr


def cache_by(backend: str, folder: Path, teacher: Path, **sections: Any) -> Cache:
    """A cache whose teacher ran by this backend, each row in a pass of its own."""
    small = {"positions_per_batch": 1, "threads_per_actor": 1}
    recipe = tiny_recipe(folder, teacher=teacher, precompute=small, **sections)
    assert recipe.teacher is not None
    named = recipe.teacher.model_copy(update={"backend": backend})
    return Cache.open(build_cache(recipe.model_copy(update={"teacher": named})))


@pytest.mark.parametrize("logits", [{"kind": "top-k", "k": 8}, {"kind": "head+sketch", "k": 6, "rank": 8}])
def test_a_backend_from_outside_captures_what_the_reference_does(
    added: dict[str, Any], tmp_path: Path, logits: dict[str, Any]
) -> None:
    """To the last bit."""
    teacher = tiny_teacher(tmp_path / "teacher")
    caches = [cache_by(name, tmp_path / name, teacher, targets={"logits": logits}) for name in BACKENDS]
    assert [cache.manifest.model["backend"] for cache in caches] == ["transformers", "one-by-one"]
    reference, other = (cache.manifest for cache in caches)
    assert reference.fingerprint == other.fingerprint
    assert reference.shards == other.shards  # by the sha256 of their files


def test_a_backend_says_what_it_cannot_store_and_one_that_nobody_has_is_refused(
    added: dict[str, Any], tmp_path: Path
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    with pytest.raises(ModelError, match="one-by-one shows no layers; leave out targets.hidden"):
        cache_by("one-by-one", tmp_path / "layers", teacher, targets={"hidden": {"layers": [1]}})
    with pytest.raises(
        RecipeError, match="teacher.backend is 'two-by-two'; there is transformers, one-by-one; install"
    ):
        cache_by("two-by-two", tmp_path / "nobody", teacher)


def test_a_store_from_outside_keeps_the_same_word(added: dict[str, Any], tmp_path: Path) -> None:
    for store in (added["MemoryStore"](), LocalStore(tmp_path)):
        assert store.put_if_absent("done/1", b"a") and not store.put_if_absent("done/1", b"b")
        store.put("done/2", b"c")
        assert (store.get("done/1"), store.list("done/")) == (b"a", {"done/1": 1, "done/2": 1})
        store.delete("done/1")
        with pytest.raises(FileNotFoundError):
            store.get("done/1")
