"""Prompts: running sequences with rows of their log left to plan, in order of rank and of length. How rows are shared among them is
the scheduler's choice."""

from __future__ import annotations

from collections.abc import Iterator

from trireme.engine.sequence import Sequence
from trireme.engine.slots import Slots
from trireme.engine.waiting import length_rank


class Prompts:
    """Few: those that have a slot and wait for rows."""

    def __init__(self, slots: Slots):
        self._slots = slots
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        self._sequences.append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Remove it if it is here."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)

    def left(self, sequence: Sequence) -> int:
        """Rows that no step has yet."""
        return len(sequence.log) - int(self._slots.planned[sequence.slot])

    @property
    def num_rows(self) -> int:
        """Rows left of all."""
        return sum(map(self.left, self._sequences))

    @property
    def oldest(self) -> Sequence | None:
        """The smallest rank."""
        return min(self._sequences, key=lambda sequence: sequence.rank, default=None)

    def shortest(self, number: int, besides: Sequence) -> Sequence | None:
        """The fewest rows left, of those of the smallest priority number that step `number` does not hold yet."""
        others = (s for s in self._sequences if s is not besides and self._slots.last_step[s.slot] != number)
        return min(others, key=self.length_rank, default=None)

    def length_rank(self, sequence: Sequence) -> tuple[int, ...]:
        return length_rank(sequence, self.left(sequence))
