"""Context: keys and values that the ranks along cp computed for different rows, brought to every rank while it computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trireme.parallel.collectives import Collectives


@dataclass(frozen=True)
class Shared:
    """All rows of a step that is cut over cp, rank after rank along it."""

    counts: list[int]  # rows of each rank
    positions: torch.Tensor  # int64 [sum of counts]
    pages: torch.Tensor  # int64 [sum of counts], where they go in the pools: page * PAGE + offset


class Context:
    """Pools stay whole on each rank: decode is not cut, and any later chunk finds its whole prefix.

        this stream    keys, values | queries ............ | attention
        beside it                   | all_gather, to pages |
                                 aside                  rejoin

    Between `aside` and `rejoin` this stream has no collective, so that all of a GPU's are made one after another, in one order on all
    ranks.
    """

    def __init__(self, collectives: Collectives):
        self._along, self._side = collectives.along("cp"), collectives.side

    def all_gather(self, mine: torch.Tensor, shared: Shared) -> torch.Tensor:
        """[N, ...] of this rank's rows -> of all rows, in the order of `shared`."""
        return self._along.all_gather(mine, shared.counts)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed inside goes on beside what is computed after it. What it reads must be kept until `rejoin`, or its memory
        would be given away meanwhile. On a CPU nothing is beside anything."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def rejoin(self) -> None:
        """What is computed from here on finds what was computed aside."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
