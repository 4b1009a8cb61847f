"""How many drafts are asked for, against acceptance that is simulated: the length that brings most, and back again when it changes."""

from __future__ import annotations

import random

import pytest

from trireme.engine.draft import DraftCost, DraftLength


def simulate(length: DraftLength, rate: float, rng: random.Random, num_steps: int = 4000) -> list[int]:
    """The lengths asked for, one a step, while each draft stands with probability `rate` where those before it did."""
    asked = []
    for _ in range(num_steps):
        asked.append(length.ask())
        num_accepted = 0
        while num_accepted < asked[-1] and rng.random() < rate:
            num_accepted += 1
        length.learn(asked[-1], num_accepted)
    return asked


@pytest.mark.parametrize(("rate", "best"), [(0.0, {0}), (0.2, {0, 1}), (0.5, {1, 2, 3}), (0.7, {2, 3, 4}), (0.9, {4}), (1.0, {4})])
def test_length_follows_acceptance(rate, best):
    length = DraftLength(4)
    last = simulate(length, rate, random.Random(1))[-1000:]
    usual = max(set(last), key=last.count)
    assert usual in best
    assert last.count(4) >= 15, "all are tried now and then"


def test_a_head_that_is_never_right_is_soon_left_alone():
    assert simulate(DraftLength(1), 0.0, random.Random(7), 60)[20:].count(0) > 35


def test_it_grows_again():
    length, rng = DraftLength(4), random.Random(2)
    assert simulate(length, 0.95, rng)[-1000:].count(4) > 950
    none = simulate(length, 0.05, rng)[-1000:]
    assert none.count(0) > 900
    many = simulate(length, 0.95, rng)[-1000:]
    assert many.count(4) > 950


def test_the_worked_example():
    length = DraftLength(2)
    length.rates = [0.3, 0.3]
    assert length.best() == 1
    length.rates = [0.5, 0.5]
    assert length.best() == 2, "1.75 tokens for 1.3 steps are more than 1.5 for 1.15"
    length.rates = [0.1, 0.1]
    assert length.best() == 0, "1 token for 1 step is more than 1.1 for 1.15"


def test_rates_are_of_drafts_that_were_reached():
    length = DraftLength(3)
    before = list(length.rates)
    length.learn(3, 1)
    assert length.rates[0] > before[0] and length.rates[1] < before[1] and length.rates[2] == before[2]


def test_fixed_length():
    length = DraftLength(3, adapts=False)
    assert set(simulate(length, 0.0, random.Random(0), 200)) == {3}


def measure(
    cost: DraftCost, asked: list[int], rng: random.Random, *, row: float, draft: float, wait: float = 0.0, num_sequences: int = 4
) -> None:
    """Steps of 10 ms beside rows, drafts and waiting, the clock a tenth off at the most; one in fifty is held up."""
    verified = 0
    for num_drafts in asked:
        num_rows = num_sequences * (1 + verified)
        exact = 0.01 + row * num_rows + draft * num_drafts + wait * (verified > 0)
        cost.learn(num_rows, num_drafts, verified > 0, exact * rng.uniform(0.9, 1.1) * (5 if rng.random() < 0.02 else 1))
        verified = num_drafts


def test_what_a_draft_costs_is_measured():
    length, rng = DraftLength(3), random.Random(3)
    assert length.cost.of(4) == (0.0, 0.15), "until then it is assumed"
    measure(length.cost, simulate(length, 0.7, rng, 1000), rng, row=0.0002, draft=0.002, wait=0.005)
    assert length.cost.of(1) == pytest.approx((0.005 / 0.0102, (0.0002 + 0.002) / 0.0102), rel=0.35)
    assert length.cost.of(30).draft == pytest.approx((0.006 + 0.002) / 0.016, rel=0.35), "more rows, and more of each step"


def test_where_the_next_step_would_wait_long_nothing_is_drafted():
    length, rng = DraftLength(2), random.Random(6)
    measure(length.cost, simulate(length, 0.9, rng, 1000), rng, row=0.0, draft=0.001, wait=0.03)
    length.rates = [0.9, 0.9]
    assert length.best() == 0, "2.71 tokens for 4.2 steps are less than 1 for 1"


def test_steps_that_are_all_alike_say_nothing_of_drafts():
    cost, rng = DraftCost(), random.Random(4)
    measure(cost, [2] * 500, rng, row=0.0002, draft=0.002)
    assert cost.of(4) == (0.0, 0.15)


@pytest.mark.parametrize(("draft", "best"), [(0.0, {4}), (0.0005, {4}), (0.004, {1, 2}), (0.02, {0})])
def test_dear_drafts_are_fewer(draft, best):
    length, rng = DraftLength(4), random.Random(5)
    measure(length.cost, simulate(length, 0.7, rng, 1000), rng, row=0.0, draft=draft)
    length.rates = [0.7] * 4
    assert length.best() in best
