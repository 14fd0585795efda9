"""Caches in a place: found from their manifests, filtered, and one that cannot be read hides no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teachercache.cli import main
from teachercache.errors import UserError
from teachercache.sharing.catalogue import Filter, list_caches

from builders import sentences, tiny_cache


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches, one of them deeper, a third whose manifest is cut, a link to the first, and folders without any."""
    top = tmp_path_factory.mktemp("caches")
    first = tiny_cache(top / "made", texts=sentences(10), targets={"logits": {"kind": "top-k", "k": 8}})
    other = tiny_cache(top / "other", texts=sentences(12), targets={"logits": {"kind": "full"}})
    place = top / "place"
    shutil.copytree(first, place / "chat")
    shutil.copytree(other, place / "team" / "code")
    shutil.copytree(first, place / "torn")
    (place / "torn" / "manifest.json").write_text("{")
    (place / "linked").symlink_to(place / "chat")
    (place / "empty").mkdir()
    shutil.copytree(first, place / ".hidden")
    return place


def listed(*arguments: str, capsys: Any) -> list[dict[str, Any]]:
    with pytest.raises(SystemExit) as end:
        main(["ls", *arguments, "--json"])
    assert end.value.code == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["caches"]
    return found


def test_a_folder_is_searched_and_a_torn_cache_is_told(place: Path, capsys: Any) -> None:
    chat, code, torn = listed(str(place), capsys=capsys)
    assert (chat["name"], code["name"], torn["name"]) == ("chat", "team/code", "torn")
    assert chat["targets"]["logits"] == "top-k" and chat["rows"] > 0 and chat["positions"] > chat["rows"]
    assert code["temperatures"] == "any" and isinstance(chat["temperatures"], list)
    assert chat["date"].startswith("20") and "manifest" in torn["problem"] and "rows" not in torn


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Filter(target="TOP"), ["chat"]), (Filter(target="nothing"), []), (Filter(teacher="teacher"), ["chat", "team/code"]),
        (Filter(), ["chat", "team/code", "torn"]),
    ],
)  # fmt: skip
def test_filters(place: Path, wanted: Filter, names: list[str]) -> None:
    assert [found["name"] for found in list_caches([str(place)], wanted)] == names


def test_a_fingerprint_finds_its_cache_and_that_of_settings_all_that_have_them(place: Path) -> None:
    [chat, *_] = list_caches([str(place)])
    for digest, names in ((chat["fingerprint"], ["chat"]), (chat["settings_fingerprint"][:10], ["chat", "team/code"])):
        assert [found["name"] for found in list_caches([str(place)], Filter(fingerprint=digest))] == names


def test_a_catalogue_names_caches_relative_to_itself(place: Path) -> None:
    catalogue = place / "empty" / "team.yaml"
    catalogue.write_text("- ../chat\n- {name: code, cache: ../team/code}\n- ../gone\n")
    chat, code, gone = list_caches([str(catalogue)])
    assert (chat["name"], code["name"], gone["name"]) == ("../chat", "code", "../gone")
    assert code["fingerprint"] != chat["fingerprint"] and "no cache" in gone["problem"]


@pytest.mark.parametrize("text", ["chat: ../chat", "- {cache: a, colour: red}", "- [1, 2]", "- {", "- 3"])
def test_what_is_no_catalogue_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "team.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"team.yaml is no catalogue .*it is a list in YAML") as error:
        list_caches([str(path)])
    assert "\n" not in str(error.value)


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder, nor a URL, nor a catalogue"):
        list_caches([str(tmp_path / "nowhere")])


def test_people_see_a_table_and_the_problems(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["ls", str(place)])
    shown = capsys.readouterr().out
    assert "team/code" in shown and "top-k" in shown and "torn: " in shown
    with pytest.raises(SystemExit):
        main(["ls", str(place / "empty"), "--target", "none"])
    assert "no cache there" in capsys.readouterr().out
