"""Seconds of stages: each has its own, without those of the stages inside it."""

from __future__ import annotations

import time

import pytest

from teachercache.stage_times import measured, stage


def test_a_stage_has_its_own_seconds_without_those_inside_it() -> None:
    with measured() as seconds:
        began = time.perf_counter()
        with stage("outer"):
            for _ in range(3):
                with stage("inner"):
                    time.sleep(0.002)
        whole = time.perf_counter() - began
    assert set(seconds) == {"outer", "inner"} and seconds["inner"] >= 0.006
    assert 0 <= seconds["outer"] <= whole - seconds["inner"]


def test_nothing_is_kept_where_nobody_measures_and_nothing_is_lost_by_an_error() -> None:
    with stage("alone"):
        pass
    with pytest.raises(ZeroDivisionError), measured() as seconds, stage("outer"), stage("failing"):
        raise ZeroDivisionError
    assert set(seconds) == {"outer", "failing"}
    with measured() as others, stage("later"):
        pass
    assert set(others) == {"later"} and "later" not in seconds
