"""Word problems in arithmetic from a seed: a GSM8K in small. Text and numbers alone; what learns them or answers them is elsewhere.

A problem is a story of one number. It begins somewhere, things happen to it, and a question asks for what became of it:

    Question: Mia has 4 boxes with 6 pencils in each. Mia gives 5 pencils to Tom. How many pencils does Mia have now?
    Answer: Mia begins with 4 * 6 = 24 pencils.
    Mia has 24 - 5 = 19 pencils left.
    #### 19
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NUM_HELD_OUT = 1319  # as many as GSM8K's test set has
MAX_STEPS = 4
_LARGEST = 999
_HELD_OUT_OF_256 = 16  # chains of calculations that are kept from training


class Calculation(NamedTuple):
    left: int
    sign: str  # one of + - * /; division is exact
    right: int

    @property
    def result(self) -> int:
        left, _, right = self
        return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[self.sign]

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    story: str  # with its question
    steps: tuple[str, ...]  # a sentence for each calculation, which it holds
    calculations: tuple[Calculation, ...]

    @property
    def answer(self) -> int:
        return self.calculations[-1].result

    @property
    def prompt(self) -> str:
        return f"Question: {self.story}\nAnswer:"

    @property
    def solution(self) -> str:
        """What follows the prompt."""
        return " " + "\n".join([*self.steps, f"#### {self.answer}"])


def answer_of(text: str) -> int | None:
    """The number after the last `####`, or None."""
    found = re.findall(r"#### (\d+)", text)
    return int(found[-1]) if found else None


def training_problems(seed: int | str) -> Iterator[Problem]:
    """Without end."""
    draw = random.Random(seed)
    while True:
        if not is_held_out(problem := draw_problem(draw)):
            yield problem


def held_out_problems(count: int = NUM_HELD_OUT, seed: int = 0) -> list[Problem]:
    """`count` different ones; more of a seed begin with fewer of it."""
    draw, found = random.Random(seed), dict[str, Problem]()
    while len(found) < count:
        if is_held_out(problem := draw_problem(draw)):
            found.setdefault(problem.story, problem)
    return list(found.values())


def is_held_out(problem: Problem) -> bool:
    """By a hash of the chain of calculations: no problem of training has the numbers of one that is held out, in any words."""
    chain = ", ".join(map(str, problem.calculations))
    return hashlib.sha256(chain.encode()).digest()[0] < _HELD_OUT_OF_256


def draw_problem(draw: random.Random) -> Problem:
    """Of 1 to MAX_STEPS calculations, each number of them equally likely."""
    num_steps = draw.randint(1, MAX_STEPS)
    while True:
        begin, end = draw.choice(_BEGINNINGS), draw.choice(_ENDINGS)
        num_changes = num_steps - begin.num_steps - end.num_steps
        if num_changes >= 0:
            turns = [begin, *draw.choices(_CHANGES, k=num_changes), end]
            if (problem := _tell(draw, turns)) is not None:
                return problem


class _Turn(NamedTuple):
    """A sentence and what it does to the number so far: `sign` with {n}, which is drawn; an empty sign does nothing."""

    tells: str
    sign: str = ""
    solves: str = ""  # {sum} is the calculation
    together: bool = False  # whether the result and the number before are then added

    @property
    def num_steps(self) -> int:
        return bool(self.sign) + self.together


_BEGINNINGS = (
    _Turn("{who} has {v} {things}."),
    _Turn("{who} has {v} {holders} with {n} {things} in each.", "*", "{who} begins with {sum} {things}."),
    _Turn("{who} has {v} old {things} and {n} new ones.", "+", "{who} begins with {sum} {things}."),
)
_CHANGES = (
    _Turn("{who} buys {n} more {things}.", "+", "{who} now has {sum} {things}."),
    _Turn("{other} gives {who} {n} {things}.", "+", "{who} now has {sum} {things}."),
    _Turn("{who} finds {n} {things}.", "+", "{who} now has {sum} {things}."),
    _Turn("{who} gives {n} {things} to {other}.", "-", "{who} has {sum} {things} left."),
    _Turn("{who} loses {n} {things}.", "-", "{who} has {sum} {things} left."),
    _Turn("{who} sells {n} {things}.", "-", "{who} has {sum} {things} left."),
    _Turn("A week later {who} has {n} times as many {things}.", "*", "After a week {who} has {sum} {things}."),
    _Turn("{who} keeps one of every {n} {things} and gives away the rest.", "/", "{who} keeps {sum} {things}."),
)
_ENDINGS = (
    _Turn("How many {things} does {who} have now?"),
    _Turn("{who} shares them equally among {n} friends. How many {things} does each friend get?", "/", "Each friend gets {sum} {things}."),
    _Turn("{who} packs them into bags of {n}. How many bags does {who} fill?", "/", "{who} fills {sum} bags."),
    _Turn("{who} sells them for {n} dollars each. How many dollars does {who} get?", "*", "{who} gets {sum} dollars."),
    _Turn("{other} has {n} more {things} than {who}. How many {things} does {other} have?", "+", "{other} has {sum} {things}."),
    _Turn("{other} has {n} fewer {things} than {who}. How many {things} does {other} have?", "-", "{other} has {sum} {things}."),
    _Turn("{other} has {n} more {things} than {who}. How many do they have together?", "+", "{other} has {sum} {things}.", True),
    _Turn("{other} has {n} fewer {things} than {who}. How many do they have together?", "-", "{other} has {sum} {things}.", True),
    _Turn("{other} has {n} times as many {things} as {who}. How many do they have together?", "*", "{other} has {sum} {things}.", True),
)
_TOGETHER = "Together they have {sum} {things}."
_NAMES = ("Ada", "Ali", "Ben", "Cem", "Eva", "Finn", "Ida", "Ivo", "Jan", "Kai", "Lea", "Mia", "Noa", "Omar", "Pia", "Raj", "Tom", "Zoe")
_THINGS = ("apples", "books", "buttons", "cards", "coins", "cups", "eggs", "lemons", "marbles", "nuts", "pencils", "shells", "stamps")
_HOLDERS = ("bags", "boxes", "drawers", "jars", "piles", "trays")


def _tell(draw: random.Random, turns: Sequence[_Turn]) -> Problem | None:
    """The problem of these turns, or None where the numbers drawn do not allow one of them."""
    who, *others = draw.sample(_NAMES, 1 + len(turns))
    words = {"who": who, "things": draw.choice(_THINGS), "holders": draw.choice(_HOLDERS)}
    value = draw.randint(2, 99)
    told: list[str] = []
    steps: list[str] = []
    calculations: list[Calculation] = []
    for turn, other in zip(turns, others, strict=True):
        words |= {"other": other, "v": str(value)}
        if turn.sign:
            numbers = _numbers(turn.sign, value)
            if not numbers:
                return None
            calculation = Calculation(value, turn.sign, draw.choice(numbers))
            words["n"] = str(calculation.right)
            calculations.append(calculation)
            steps.append(turn.solves.format(**words, sum=calculation))
            value = calculation.result
        if turn.together:
            calculation = Calculation(calculations[-1].left, "+", value)
            if calculation.result > _LARGEST:
                return None
            calculations.append(calculation)
            steps.append(_TOGETHER.format(**words, sum=calculation))
        told.append(turn.tells.format(**words))
    return Problem(" ".join(told), tuple(steps), tuple(calculations))


def _numbers(sign: str, value: int) -> Sequence[int]:
    """What may stand to the right of `value`, so that results are whole and from 2 to _LARGEST (no "1 apples")."""
    if sign == "+":
        return range(2, min(99, _LARGEST - value) + 1)
    if sign == "-":
        return range(2, min(99, value - 2) + 1)
    if sign == "*":
        return range(2, min(9, _LARGEST // value) + 1)
    return [number for number in range(2, 10) if value % number == 0 and value // number > 1]
