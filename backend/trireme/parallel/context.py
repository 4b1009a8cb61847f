"""Context: keys and values that the ranks along cp computed for different rows, brought to every rank while it computes on."""

from __future__ import annotations

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
                              aside                  wait
    """

    def __init__(self, collectives: Collectives):
        self._along, self.aside = collectives.along("cp"), collectives.aside

    def all_gather(self, mine: torch.Tensor, shared: Shared) -> torch.Tensor:
        """[N, ...] of this rank's rows -> of all rows, in the order of `shared`."""
        return self._along.all_gather(mine, shared.counts)
