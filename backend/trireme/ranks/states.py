"""States: what layers keep of each slot besides pages, and snapshots of it, from which a sequence with the same beginning goes
on. Whole states are copied here; the rows of a step change them in ops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trireme.core.step import array
from trireme.ranks.staging import upload


class States:
    """`pools`: [S, ...] each, of all layers: rows are slots, then snapshots. Copies are made in the order of steps, as rows are
    computed, so a snapshot may be given away by the step after the one that reads it."""

    def __init__(self, pools: Sequence[torch.Tensor], num_slots: int):
        self._pools, self._num_slots = pools, num_slots

    def restore(self, pairs: bytes) -> None:
        """Step.restores, before its rows."""
        snapshots, slots = _columns(pairs)
        self._copy(snapshots + self._num_slots, slots)

    def save(self, pairs: bytes) -> None:
        """Step.saves, after its rows."""
        slots, snapshots = _columns(pairs)
        self._copy(slots, snapshots + self._num_slots)

    def _copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        if not len(sources) or not self._pools:
            return
        there = upload([sources, targets], self._pools[0].device)
        for pool in self._pools:
            pool.index_copy_(0, there[1], pool.index_select(0, there[0]))


def _columns(pairs: bytes) -> np.ndarray:
    """int64 [2, n] of a step's int32 [n, 2]."""
    return array(pairs).reshape(-1, 2).T.astype(np.int64)
