"""Word problems: answers computed again from their text, sets that share nothing, and the same ones for the same seed."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from trireme_tools.problems import MAX_STEPS, NUM_HELD_OUT, Problem, answer_of, held_out_problems, is_held_out, training_problems

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.fixture(scope="module")
def held_out() -> list[Problem]:
    return held_out_problems()


@pytest.fixture(scope="module")
def training() -> list[Problem]:
    return list(islice(training_problems(seed=0), 20_000))


def test_every_step_of_every_solution_is_right(held_out, training):
    for problem in [*held_out, *training]:
        given, last = set(map(int, re.findall(r"\d+", problem.story))), 0
        for step in problem.steps:
            ((left, sign, right, result),) = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", step)
            assert OPERATIONS[sign](int(left), int(right)) == int(result)
            assert {int(left), int(right)} <= given  # from the story, or made on the way
            given.add(last := int(result))
        assert len(problem.steps) == len(problem.calculations) <= MAX_STEPS
        assert answer_of(problem.solution) == problem.answer == last


def test_the_story_and_its_steps():
    """One of each number of steps, to be read."""
    found = {len(problem.steps): problem for problem in islice(training_problems(seed=3), 40)}
    assert set(found) == {1, 2, 3, 4}
    one = found[1]
    assert one.prompt == f"Question: {one.story}\nAnswer:" and one.solution == f" {one.steps[0]}\n#### {one.answer}"


def test_held_out_problems_are_in_no_training_set(held_out, training):
    assert len({problem.story for problem in held_out}) == NUM_HELD_OUT == 1319
    assert not {problem.calculations for problem in held_out} & {problem.calculations for problem in training}
    assert not {problem.story for problem in held_out} & {problem.story for problem in training}
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, training))


def test_a_seed_names_its_problems(held_out):
    assert held_out_problems(10) == held_out[:10] and held_out_problems(10, seed=1) != held_out[:10]
    first, again, other = (list(islice(training_problems(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_answers_in_text():
    assert answer_of(" Mia has 2 + 3 = 5 cups.\n#### 5") == 5
    assert answer_of("#### 5\nQuestion: ...\n#### 17\n") == 17
    assert answer_of("5") is None and answer_of("####") is None
