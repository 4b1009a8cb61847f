"""Many ranks of one stage in threads of this process: groups made of barriers, so that a test of any plan needs no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from trireme.parallel.collectives import Collectives
from trireme.parallel.mesh import Span

T = TypeVar("T")


class _Board:
    """Where the members of one group lay down what they bring, and read what all brought."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size, timeout=60)
        self._brought: list = [None] * size

    def exchange(self, place: int, value: object) -> list:
        self._brought[place] = value
        self._barrier.wait()
        every = list(self._brought)
        self._barrier.wait()
        return every

    def abort(self) -> None:
        self._barrier.abort()


class ThreadGroup:
    """A Group (parallel/comm.py). `calls` lists its collectives with the rows that they moved."""

    def __init__(self, board: _Board, place: int, size: int):
        self.size, self.place = size, place
        self.calls: list[tuple[str, int]] = []
        self._board = board

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(("all_reduce", len(x)))
        return torch.stack(self._board.exchange(self.place, x.clone())).sum(0)

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self.calls.append(("all_gather", sum(counts)))
        every = self._board.exchange(self.place, x.clone())
        assert [len(part) for part in every] == counts
        return torch.cat(every)

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self.calls.append(("reduce_scatter", len(x)))
        assert len(x) == sum(counts)
        return torch.stack(self._board.exchange(self.place, x.clone())).sum(0).split(counts)[self.place]

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        self.calls.append(("all_to_all", len(x)))
        assert len(x) == sum(sent)
        every = self._board.exchange(self.place, x.clone().split(sent))
        came = [parts[self.place] for parts in every]
        assert [len(part) for part in came] == received
        return torch.cat(came)


class Boards:
    """The groups of one stage, found by what each rank's Collectives needs."""

    def __init__(self) -> None:
        self._boards: dict[tuple[Span, int], _Board] = {}
        self._lock = threading.Lock()

    def groups(self, collectives: Collectives) -> Mapping[Span, ThreadGroup]:
        found = {}
        for span in collectives.spans:
            key = span, span.members(collectives.rank)[0]
            with self._lock:
                board = self._boards.setdefault(key, _Board(span.size))
            found[span] = ThreadGroup(board, span.place(collectives.rank), span.size)
        return found

    def abort(self) -> None:
        for board in self._boards.values():
            board.abort()


def on_every_rank(num_ranks: int, run: Callable[[int], T], boards: Boards | None = None) -> list[T]:
    """run(rank) in a thread each. Where one fails the others are freed, and its error is raised."""

    def guarded(rank: int) -> T:
        try:
            return run(rank)
        except BaseException:
            if boards is not None:
                boards.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        runs = [pool.submit(guarded, rank) for rank in range(num_ranks)]
        errors = [error for each in runs if (error := each.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [each.result() for each in runs]
