"""Two caches, or two runs, held against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teachercache.cli import main
from teachercache.errors import UserError
from teachercache.sharing.comparison import compare

from builders import sentences, tiny_cache, tiny_teacher


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two caches of one teacher; the second has four texts more, and a larger head."""
    top = tmp_path_factory.mktemp("compared")
    teacher, texts = tiny_teacher(top / "teacher"), sentences(14)
    made = [
        tiny_cache(top / name, teacher=teacher, texts=some, targets={"logits": {"kind": "top-k", "k": k}})
        for name, some, k in (("left", texts[:10], 8), ("right", texts, 16))
    ]
    return str(made[0]), str(made[1])


def run(folder: Path, **settings: Any) -> str:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"cache_fingerprint": "ab", "recipe": {"train": settings}}))
    return str(folder)


def test_a_cache_does_not_differ_from_itself(caches: tuple[str, str]) -> None:
    result = compare(caches[0], caches[0], rows=True)
    assert result["equal"] and result["differences"] == []
    assert all(counts["left_only"] == counts["right_only"] == 0 for counts in result["rows"].values())


def test_settings_and_counts_of_caches(caches: tuple[str, str]) -> None:
    result = compare(*caches, rows=True)
    found = {item["key"]: (item["left"], item["right"]) for item in result["differences"]}
    assert found["targets.logits.k"] == (8, 16) and found["audit.rows_in"] == (10, 14)
    assert not any(key.startswith(("teacher.", "tokenizer")) for key in found)
    assert (
        found["settings_fingerprint"][0] == found["settings_fingerprint"][1]
        if "settings_fingerprint" in found
        else True
    )
    both = sum(counts["both"] for counts in result["rows"].values())
    assert both > 0 and sum(counts["left_only"] for counts in result["rows"].values()) == 0
    assert sum(counts["right_only"] for counts in result["rows"].values()) > 0


def test_settings_and_summaries_of_runs(tmp_path: Path) -> None:
    left, right = run(tmp_path / "a", seed=1, steps=[1, 2]), run(tmp_path / "b", seed=True, steps=[1, 3], warmup=None)
    (tmp_path / "b" / "summary.json").write_text(json.dumps({"losses": {"total": 2.5}}))
    result = compare(left, right)
    assert result["kind"] == "run" and [(item["key"], item["left"], item["right"]) for item in result["differences"]] == [
        ("recipe.train.seed", 1, True), ("recipe.train.steps.1", 2, 3), ("recipe.train.warmup", None, None),
        ("summary.losses", None, {"total": 2.5}),
    ]  # fmt: skip


def test_a_cache_is_not_compared_with_a_run(caches: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a run and .* a cache; compare two of the same kind"):
        compare(run(tmp_path / "run"), caches[0])
    with pytest.raises(UserError, match="these are runs; leave it out"):
        compare(str(tmp_path / "run"), str(tmp_path / "run"), rows=True)


def test_a_damaged_run_is_a_line(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    Path(folder, "run.json").write_text("[1")
    with pytest.raises(UserError, match=r"run.json is damaged"):
        compare(folder, folder)


def test_people_see_a_table(caches: tuple[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as end:
        main(["diff", *caches, "--rows"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "targets.logits.k" in shown and "train rows: " in shown
    with pytest.raises(SystemExit):
        main(["diff", caches[0], caches[0]])
    assert "the two caches do not differ" in capsys.readouterr().out
