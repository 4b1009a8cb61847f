"""Many ranks of one stage in threads of this process: groups made of barriers, so that a test of any plan needs no processes."""

from __future__ import annotations

import threading
from collections import defaultdict
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


class Traffic:
    """What one rank did: its collectives by name, in order, and the bytes that it had to send for them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.num_bytes = 0.0

    def note(self, call: str, num_bytes: float) -> None:
        self.calls.append(call)
        self.num_bytes += num_bytes


class ThreadGroup:
    """A Group (parallel/comm.py). A reduction for all counts as one whose result is dealt out, and then gathered."""

    def __init__(self, board: _Board, place: int, size: int, axis: str, traffic: Traffic):
        self._board, self._place, self._size, self._axis, self._traffic = board, place, size, axis, traffic

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._traffic.note(f"all_reduce {self._axis}", 2 * x.nbytes * (self._size - 1) / self._size)
        return torch.stack(self._board.exchange(self._place, x.clone())).sum(0)

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self._traffic.note(f"all_gather {self._axis}", x.nbytes * (self._size - 1))
        every = self._board.exchange(self._place, x.clone())
        assert [len(part) for part in every] == counts
        return torch.cat(every)

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        assert len(x) == sum(counts)
        self._traffic.note(f"reduce_scatter {self._axis}", x.nbytes - x[: counts[self._place]].nbytes)
        return torch.stack(self._board.exchange(self._place, x.clone())).sum(0).split(counts)[self._place]

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        assert len(x) == sum(sent)
        self._traffic.note(f"all_to_all {self._axis}", x.nbytes - x[: sent[self._place]].nbytes)
        every = self._board.exchange(self._place, x.clone().split(sent))
        came = [parts[self._place] for parts in every]
        assert [len(part) for part in came] == received
        return torch.cat(came)

    def close(self) -> None:
        self._board.abort()


class Boards:
    """The groups of one stage, found by what each rank's Collectives needs."""

    def __init__(self) -> None:
        self.traffic: defaultdict[int, Traffic] = defaultdict(Traffic)  # by rank
        self._boards: dict[tuple[Span, int], _Board] = {}
        self._lock = threading.Lock()

    def groups(self, collectives: Collectives) -> Mapping[Span, ThreadGroup]:
        found, rank = {}, collectives.rank
        for span in collectives.spans:
            with self._lock:
                board = self._boards.setdefault((span, span.members(rank)[0]), _Board(span.size))
            found[span] = ThreadGroup(board, span.place(rank), span.size, collectives.mesh.name_of(span), self.traffic[rank])
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
