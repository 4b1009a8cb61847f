"""Waiting: the queue of sequences without a slot, in order of rank and in order of length. Who leaves it is the scheduler's choice."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from trireme.engine.sequence import Sequence

Entry = tuple[tuple[int, ...], Sequence]  # keys are unique, so two entries never compare their sequences


class Waiting:
    """Sorted lists: a queue is bounded to about a thousand, where shifting a list is cheaper than a heap's stale entries."""

    def __init__(self):
        self._by_rank: list[Entry] = []
        self._by_length: list[Entry] = []
        self.num_rows = 0  # tokens of all waiting logs

    def __len__(self) -> int:
        return len(self._by_rank)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([sequence for _, sequence in self._by_rank])

    @property
    def first(self) -> Sequence | None:
        """The smallest rank."""
        return self._by_rank[0][1] if self._by_rank else None

    @property
    def shortest(self) -> Sequence | None:
        """The shortest log of the smallest priority number."""
        return self._by_length[0][1] if self._by_length else None

    def push(self, sequence: Sequence) -> None:
        insort(self._by_rank, (sequence.rank, sequence))
        insort(self._by_length, (length_rank(sequence, len(sequence.log)), sequence))
        self.num_rows += len(sequence.log)

    def remove(self, sequence: Sequence) -> None:
        """The sequence's log has not changed since `push`."""
        for entries, key in ((self._by_rank, sequence.rank), (self._by_length, length_rank(sequence, len(sequence.log)))):
            index = bisect_left(entries, (key,))
            assert entries[index][1] is sequence, "a sequence left the queue that was not in it"
            del entries[index]
        self.num_rows -= len(sequence.log)


def length_rank(sequence: Sequence, num_rows: int) -> tuple[int, ...]:
    """Order among the shortest: by priority, then by rows to compute."""
    priority, *rest = sequence.rank
    return (priority, num_rows, *rest)
