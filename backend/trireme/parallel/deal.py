"""Deal: which rows of a step each rank of a stage has, under any cut, and how a collective's rows are put in order. Numbers
only; nothing is sent here."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.step import Regime
from trireme.parallel.layout import Cut, Move
from trireme.parallel.mesh import Span
from trireme.parallel.plan import Plan
from trireme.parallel.zigzag import Chunks, chunks_of, rows_of, whole, zigzag


class Path(NamedTuple):
    """How one rank carries out a Move: rows of x to send in their order, what each member of the span brings or gets, and
    rows to keep of what came, in their order."""

    send: torch.Tensor | slice
    counts: list[int]
    keep: torch.Tensor | slice


class Deal:
    """A step's rows, seen by rank `rank` of a stage. Rows are numbered item after item; a rank has real rows only, so that
    ranks may have different numbers of them, also none.

    Where a cut reaches beyond tp, each item is cut zig-zag over cp (or, in a step without context parallelism, the step's rows
    as one); then the rows of each shard are cut over tp, in blocks that are equal but for the last.

    A step in strips is dealt out strip by strip, and what a rank has of them stands one behind the other:

        rows        0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
        rank 0      0 1 2 3           8 9 10 11
        rank 1              4 5 6 7             12 13 14 15
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        counts: np.ndarray,
        regime: Regime = Regime(),
        device: torch.device | str = "cpu",
        *,
        head_rows: np.ndarray | None = None,  # int64 [R]: those whose logits are asked for, in any order; None: all, in theirs
        in_strips: bool = True,
    ):
        self.regime = regime
        self.num_rows = int(counts.sum())
        self._plan, self._rank, self._counts, self._device, self._in_strips = plan, rank, counts, device, in_strips
        self._head_rows = head_rows
        self._rows: dict[tuple[Cut, int], np.ndarray] = {}
        self._paths: dict[Move, Path] = {}

    @cached_property
    def strips(self) -> tuple[Deal, ...]:
        """The step's rows run after run, each dealt out as a step of one item; itself where there is one run."""
        sizes = self._plan.strips(self.num_rows, self.regime) if self._in_strips else ()
        if len(sizes) < 2:
            return (self,)
        runs = [np.array([size], np.int32) for size in sizes]
        return tuple(Deal(self._plan, self._rank, run, self.regime, self._device, in_strips=False) for run in runs)

    @cached_property
    def heads(self) -> Heads | None:
        """The rows whose logits are asked for; None where they are these rows as they stand."""
        every = np.arange(self.num_rows)
        rows = every if self._head_rows is None else self._head_rows
        return None if len(self.strips) == 1 and np.array_equal(rows, every) else Heads(self, rows)

    def sizes(self, cut: Cut) -> list[int]:
        """This rank's rows of each strip under a cut."""
        return [len(strip.rows(cut)) for strip in self.strips]

    @cached_property
    def chunks(self) -> Chunks:
        """What this rank attends to: its part of each item."""
        return self._chunks(self._rank // self._plan.tp)

    def own(self, rank: int | None = None) -> np.ndarray:
        """Rows that blocks of a rank compute where they want all that tp has: int64."""
        context = Span(self._plan.tp, self._plan.ranks)
        return self.rows((context,) if self.regime.cp else (), rank)

    def rows(self, cut: Cut, rank: int | None = None) -> np.ndarray:
        """Rows of a rank (this one) under a cut, in its order: int64."""
        key = cut, self._rank if rank is None else rank
        if key not in self._rows:
            self._rows[key] = self._cut(*key)
        return self._rows[key]

    def path(self, move: Move) -> Path:
        """Made once a step for each move, however many seams make it."""
        if move not in self._paths:
            self._paths[move] = self._find(move)
        return self._paths[move]

    def _chunks(self, place: int) -> Chunks:
        return zigzag(self._counts, self._plan.cp, place) if self.regime.cp else whole(self._counts)

    def _shard(self, place: int) -> np.ndarray:
        """Of one rank along cp."""
        if self.regime.cp:
            return rows_of(self._chunks(place), self._counts)
        size = -(-self.num_rows // self._plan.cp)
        return np.arange(min(place * size, self.num_rows), min((place + 1) * size, self.num_rows))

    def _cut(self, cut: Cut, rank: int) -> np.ndarray:
        if len(self.strips) > 1:
            firsts = np.cumsum([0, *(strip.num_rows for strip in self.strips[:-1])])
            return np.concatenate([first + strip.rows(cut, rank) for first, strip in zip(firsts, self.strips, strict=True)])
        tp, ranks = self._plan.tp, self._plan.ranks
        alike = [other for other in range(ranks) if all(span.place(other) == span.place(rank) for span in cut)]
        places = sorted({other // tp for other in alike}) if any(span.high > tp for span in cut) else None
        shards = [np.arange(self.num_rows)] if places is None else [self._shard(place) for place in places]
        if not any(span.low < tp for span in cut):
            return np.concatenate(shards)
        blocks = []
        for shard in shards:
            size = -(-len(shard) // tp)
            blocks += [shard[place * size : (place + 1) * size] for place in sorted({other % tp for other in alike})]
        return np.concatenate(blocks)

    def _find(self, move: Move) -> Path:
        members = move.span.members(self._rank)
        before, after = self.rows(move.before), self.rows(move.after)
        if move.collective == "all_gather":
            parts = [self.rows(move.before, member) for member in members]
            return Path(slice(None), [len(part) for part in parts], self._pick(np.concatenate(parts), after))
        if move.collective == "reduce_scatter":
            parts = [self.rows(move.after, member) for member in members]
            return Path(self._pick(before, np.concatenate(parts)), [len(part) for part in parts], slice(None))
        return Path(slice(None), [], self._pick(before, after))

    def _pick(self, have: np.ndarray, want: np.ndarray, *, copies: bool = False) -> torch.Tensor | slice:
        """Places in `have` of the rows `want`; a slice where they are neighbours, which copies nothing; of some only if not `copies`."""
        at = np.empty(self.num_rows, np.int64)
        at[have] = np.arange(len(have))
        places = at[want]
        if not len(places):
            return slice(0, 0)
        if (np.diff(places) == 1).all():
            run = slice(int(places[0]), int(places[-1]) + 1)
            if run == slice(0, len(have)):
                return slice(None)
            if not copies:
                return run
        there = torch.from_numpy(places)
        if torch.device(self._device).type == "cuda":
            there = there.pin_memory()  # from other memory a copy waits for the stream
        return there.to(self._device, non_blocking=True)


class Heads(Deal):
    """Those of a step's rows whose logits are asked for, numbered in that order, in one strip. A rank has those that it had before, so
    that none need be sent to it."""

    def __init__(self, whole: Deal, rows: np.ndarray):
        super().__init__(whole._plan, whole._rank, np.array([len(rows)], np.int32), whole.regime, whole._device, in_strips=False)
        self._whole, self._among = whole, rows
        self._places: dict[Cut, torch.Tensor | slice] = {}

    def places(self, cut: Cut) -> torch.Tensor | slice:
        """Where this rank's rows under a cut stand among all that it had; a slice of all or none alone, so that no kernel finds rows
        where in memory it has found none before."""
        if cut not in self._places:
            self._places[cut] = self._whole._pick(self._whole.rows(cut), self._among[self.rows(cut)], copies=True)
        return self._places[cut]

    @cached_property
    def chunks(self) -> Chunks:
        return chunks_of(self._among[self.own()], self._whole._counts)

    def _cut(self, cut: Cut, rank: int) -> np.ndarray:
        had = np.zeros(self._whole.num_rows, bool)
        had[self._whole.rows(cut, rank)] = True
        return np.flatnonzero(had[self._among])
