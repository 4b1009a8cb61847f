"""Placement: which slot holds which expert, which rank along ep has which slots, and to which copy of its expert a row goes. Numbers
only; weights are cut by layers/param and moved by parallel/relocation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from trireme.core.maps import is_legal, trivial_map

Choice = Literal["dynamic", "static"]


class Placement:
    """Of one layer, as one rank sees it. Ranks along ep have equal runs of slots, and a map says which expert each slot holds:

    8 experts and 2 copies, 2 ranks     rank 0: slots 0-4     rank 1: slots 5-9
    map                                 0 1 2 3 4             5 6 7 0 5

    Among the copies of an expert a row's is chosen

    dynamic   by the row's number: row n goes to copy n % copies. All ranks that see the same rows choose alike
    static    by the rank that routes the row: the copy that it has itself, or one that is always its. For rows that one rank routes

    A new map overwrites the tables on the device where they are, in stream order, so that CUDA graphs go on reading them.
    """

    def __init__(
        self,
        num_experts: int,
        num_ranks: int = 1,  # along ep; divides the slots
        place: int = 0,  # of this rank, along ep
        *,
        num_redundant: int = 0,
        choice: Choice = "dynamic",
        changes: bool = True,  # whether maps come after the first, trivial one
        device: torch.device | str = "cpu",
    ):
        assert (num_experts + num_redundant) % num_ranks == 0, "checked by the plan"
        self.num_experts, self.num_slots = num_experts, num_experts + num_redundant
        self.slots_per_rank = self.num_slots // num_ranks
        self._num_ranks, self._place, self._choice = num_ranks, place, choice
        self._most_copies = 1 + num_redundant if choice == "dynamic" else 1  # of which a rank chooses
        self._is_identity = not changes and not num_redundant
        self._table = torch.zeros(num_experts, self._most_copies + 1, dtype=torch.int64, device=device)
        self.rewrite(trivial_map(num_experts, self.num_slots))

    @property
    def here(self) -> np.ndarray:
        """The expert in each of this rank's slots, int32 [slots_per_rank]."""
        first = self._place * self.slots_per_rank
        return self.map[first : first + self.slots_per_rank]

    @property
    def copies(self) -> torch.Tensor | None:
        """What says where rows go, as `table` makes it and pick_slots reads it on the device; None where the slot of an expert is
        always the one of its number."""
        return None if self._is_identity else self._table

    def table(self, map: np.ndarray) -> torch.Tensor:
        """What this rank reads of a map, on the host, where it can be ready before the map is in force: int64 [E, most copies + 1], the
        slots that it chooses among and, in the last column, how many they are. All redundant slots may be of one expert, so there
        is room for that, and the size never changes."""
        every = slots_of(map, self.num_experts)
        if self._choice == "static":
            table = np.stack([static_slots(every, self.slots_per_rank, self._num_ranks, self._place), np.ones(self.num_experts, int)], 1)
        else:
            table = np.zeros((self.num_experts, self._most_copies + 1), np.int64)
            table[:, : every.shape[1] - 1], table[:, -1] = every[:, :-1], every[:, -1]
        return torch.from_numpy(table)

    def rewrite(self, map: np.ndarray, version: int = 0, table: torch.Tensor | None = None) -> None:
        """Put a map in force: int32 [num_slots], as version `version` of the stage's maps brought it, and its `table` if made before.
        On the device steps before this read the old one."""
        assert is_legal(map, self.num_experts, self.num_slots), f"not a map of {self.num_experts} experts: {map}"
        self.map, self.version = map.astype(np.int32), version
        self._table.copy_(self.table(map) if table is None else table, non_blocking=True)


def slots_of(map: np.ndarray, num_experts: int) -> np.ndarray:
    """The slots of each expert, lowest first, and in the last column how many there are: int64 [E, most copies + 1].

    0 1 2 0 gives [0 3 2], [1 0 1], [2 0 1]
    """
    counts = np.bincount(map, minlength=num_experts)
    order = np.argsort(map, kind="stable")
    table = np.zeros((num_experts, counts.max() + 1), np.int64)
    table[map[order], np.arange(len(map)) - np.repeat(np.cumsum(counts) - counts, counts)] = order
    table[:, -1] = counts
    return table


def static_slots(every: np.ndarray, slots_per_rank: int, num_ranks: int, rank: int) -> np.ndarray:
    """The copy that a rank always chooses, int64 [E], of `every` as slots_of gives them: its own, or of ranks without one the next,
    in turns that begin elsewhere for each expert.

    4 ranks with a slot each, 0 1 2 0: ranks 0 and 3 have expert 0, so ranks 1 and 2 take slot 0 and slot 3 of it.
    """
    slots, counts = every[:, :-1], every[:, -1]
    real = np.arange(slots.shape[1]) < counts[:, None]
    ranks = np.where(real, slots // slots_per_rank, num_ranks)
    has = np.zeros((len(every), num_ranks + 1), bool)
    np.put_along_axis(has, ranks, True, axis=1)
    turn = (~has[:, :rank]).sum(1) + np.arange(len(every))
    copy = np.where(has[:, rank], (ranks == rank).argmax(1), turn % counts)
    return np.take_along_axis(slots, copy[:, None], axis=1)[:, 0]


def fingerprint(picks: torch.Tensor) -> torch.Tensor:
    """int64 [T, k] -> int64 [1], which differs where any pick does, or the order of two: what ranks compare that must choose alike."""
    numbers = picks.flatten()
    mixed = numbers * 0x9E3779B97F4A7C1 + torch.arange(1, len(numbers) + 1, device=picks.device) * 0x2545F4914F6CDD1D
    return ((mixed ^ mixed >> 29) * 0x5851F42D4C957F2D).sum().view(1)
