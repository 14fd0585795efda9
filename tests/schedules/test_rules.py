"""Rules that follow the losses: balances of alpha, and a temperature that follows the student's loss."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.schedules.ratio import RatioBalance
from teachercache.schedules.student_loss import StudentLossSchedule
from teachercache.schedules.uncertainty import UncertaintyBalance


def articles_rule(losses: list[tuple[float, float]], *, alpha: float = 0.7) -> list[float]:
    """The article's text, line by line."""
    history: list[float] = []
    alphas = []
    for distillation, task in losses:
        history.append(distillation)
        if len(history) > 100:
            mean = sum(history[-100:]) / 100
            if mean > 1.5 * task:
                alpha = max(0.5, alpha * 0.95)
            elif mean < 0.7 * task:
                alpha = min(0.9, alpha * 1.05)
        alphas.append(alpha)
    return alphas


def test_the_balancer_reproduces_a_sequence_computed_by_hand() -> None:
    """100 losses of 2 change nothing. The 101st is the first that counts: mean 2 > 1.5 · 1, so 0.7 · 0.95 = 0.665; then a task
    loss of 2 lies between; then one of 4: 2 < 0.7 · 4, so 0.665 · 1.05 = 0.69825. Bounds hold: 0.5 and 0.9."""
    rule = RatioBalance(balance="ratio").rule()
    for _ in range(100):
        rule.update(distillation=2.0, ce=1.0)
        assert rule.value == 0.7
    found = []
    for ce in (1.0, 2.0, 4.0):
        rule.update(distillation=2.0, ce=ce)
        found.append(rule.value)
    assert found == pytest.approx([0.665, 0.665, 0.69825], rel=1e-12)
    for _ in range(20):
        rule.update(distillation=2.0, ce=1.0)
    assert rule.value == 0.5
    for _ in range(20):
        rule.update(distillation=2.0, ce=9.0)
    assert rule.value == 0.9


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0.01, 20)), min_size=90, max_size=160))
def test_the_balancer_is_the_articles(losses: list[tuple[float, float]]) -> None:
    rule = RatioBalance(balance="ratio").rule()
    found = []
    for distillation, ce in losses:
        rule.update(distillation=distillation, ce=ce)
        found.append(rule.value)
    assert found == pytest.approx(articles_rule(losses), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0.01, 20)), min_size=1, max_size=30))
def test_uncertainty_gives_each_term_the_weight_one_over_its_loss(losses: list[tuple[float, float]]) -> None:
    """It minimises Kendall's Σ L / (2 σ²) + log σ, tried on a grid of σ² = e^s around."""
    rule = UncertaintyBalance(balance="uncertainty", window=10, least=1e-6, most=1 - 1e-6).rule()
    for distillation, ce in losses:
        rule.update(distillation=distillation, ce=ce)
    means = [sum(column) / len(column) for column in zip(*losses[-10:], strict=True)]
    best = [
        min((s / 200 for s in range(-1200, 1200)), key=lambda s, mean=mean: mean * math.exp(-s) / 2 + s / 2)
        for mean in means
    ]
    weights = [math.exp(-s) for s in best]
    assert rule.value == pytest.approx(weights[0] / sum(weights), abs=0.01)


def test_the_temperature_falls_where_the_student_finds_it_harder() -> None:
    rule = StudentLossSchedule(schedule="student-loss", base=3, strength=10, window=4, least=1, most=6).rule()
    assert rule.value == 3
    for _ in range(3):
        rule.update(distillation=0.0, ce=1.0)
    assert rule.value == pytest.approx(3)
    rule.update(distillation=0.0, ce=2.0)
    usual, harder = 1 - math.exp(-1), 1 - math.exp(-2)
    assert rule.value == pytest.approx(3 + 10 * ((3 * usual + harder) / 4 - harder)) and rule.value < 3
    rule.update(distillation=0.0, ce=0.01)
    assert 3 < rule.value <= 6
