"""Context: keys and values that the ranks along cp computed for different rows, put together in every rank's cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trireme.parallel.collectives import Along

_PAGE_DIM = 2  # of a pool [pages, heads, PAGE, D]


@dataclass(frozen=True)
class Shared:
    """Where the rows of a step go in the pools, rank after rank along cp."""

    counts: list[int]  # rows of each rank
    pages: torch.Tensor  # int64 [sum of counts]: page * PAGE + offset


class Context:
    """Called once a layer, after this rank's rows are in the pools. Pools stay whole on each rank: decode is not cut, and any
    later chunk finds its whole prefix."""

    def __init__(self, along: Along):
        self._along = along

    def __call__(self, pools: tuple[torch.Tensor, ...], pages: torch.Tensor, shared: Shared | None) -> None:
        """`pages`: int64 [N], this rank's rows in the pools, each [pages, Hk, PAGE, D]; shared None: every rank has all rows."""
        if shared is None:
            return
        mine = torch.stack([_rows(pool, pages) for pool in pools], dim=1)  # [N, pools, Hk, D]
        every = self._along.all_gather(mine, shared.counts)
        for pool, rows in zip(pools, every.unbind(1), strict=True):
            size = pool.shape[_PAGE_DIM]
            pool[shared.pages // size, :, shared.pages % size] = rows


def _rows(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:  # -> [N, Hk, D]
    size = pool.shape[_PAGE_DIM]
    return pool[pages // size, :, pages % size]
