"""How many drafts are asked for, against acceptance that is simulated: the length that brings most, and back again when it changes."""

from __future__ import annotations

import random

import pytest

from trireme.engine.draft import DraftLength


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


@pytest.mark.parametrize(("rate", "best"), [(0.0, {1}), (0.2, {1}), (0.5, {1, 2, 3}), (0.7, {2, 3, 4}), (0.9, {4}), (1.0, {4})])
def test_length_follows_acceptance(rate, best):
    length = DraftLength(4)
    last = simulate(length, rate, random.Random(1))[-1000:]
    usual = max(set(last), key=last.count)
    assert usual in best
    assert last.count(4) >= 15, "all are tried now and then"


def test_it_grows_again():
    length, rng = DraftLength(4), random.Random(2)
    assert simulate(length, 0.95, rng)[-3:] == [4, 4, 4]
    few = simulate(length, 0.1, rng)[-1000:]
    assert few.count(1) > 950
    many = simulate(length, 0.95, rng)[-1000:]
    assert many.count(4) > 950


def test_the_worked_example():
    length = DraftLength(2)
    length.rates = [0.3, 0.3]
    assert length.best() == 1
    length.rates = [0.5, 0.5]
    assert length.best() == 2, "1.75 tokens for 1.3 steps are more than 1.5 for 1.15"


def test_rates_are_of_drafts_that_were_reached():
    length = DraftLength(3)
    before = list(length.rates)
    length.learn(3, 1)
    assert length.rates[0] > before[0] and length.rates[1] < before[1] and length.rates[2] == before[2]


def test_fixed_length():
    length = DraftLength(3, adapts=False)
    assert set(simulate(length, 0.0, random.Random(0), 200)) == {3}
