"""Param: a weight described where it is used: its whole shape, and how ranks share it. Filling it is weights/load's work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from trireme.core.refusal import Refusal
from trireme.parallel.placement import Placement

if TYPE_CHECKING:
    from trireme.layers.block import Build


@dataclass(frozen=True)
class Part:
    """One of the matrices joined along a Param's dim: `num_units` units (heads, columns, experts) of `unit` rows that stay
    together."""

    num_units: int
    unit: int = 1
    copied: bool = False  # ranks beyond num_units get copies (key/value heads)
    ragged: bool = False  # the last rank may have fewer (vocabulary)

    @property
    def whole(self) -> int:
        return self.num_units * self.unit

    def share(self, rank: int, size: int, axis: str = "tp") -> range:
        """The rows of the whole part that rank `rank` of `size` has. Refusal where units cannot be dealt out."""
        if self.copied and size > self.num_units and size % self.num_units == 0:
            start, count = rank // (size // self.num_units), 1
        elif self.num_units % size and not self.ragged:
            raise Refusal(
                f"{axis}={size} does not divide {self.num_units} units of a weight",
                why="each rank needs whole heads, columns or experts, or a whole copy of a key/value head",
                fix=f"use a {axis} that divides {self.num_units}",
            )
        else:
            count = ceil(self.num_units / size)
            start = min(rank * count, self.num_units)
            count = min(count, self.num_units - start)
        return range(start * self.unit, (start + count) * self.unit)


@dataclass(frozen=True)
class Cut:
    """How a Param's `dim` is joined of parts, and over which axis of the mesh each part is shared (None: all ranks have all)."""

    parts: tuple[Part, ...]
    axis: str | None = None
    dim: int = 0
    placement: Placement | None = None  # rows along the dim are slots of experts, and a checkpoint may have a tensor for each

    @property
    def stacked(self) -> bool:
        return self.placement is not None


def by_heads(axis: str, num_heads: int, num_kv_heads: int, head_dim: int, *, gated: bool = False) -> Cut:
    """Query, key and value rows joined, behind the queries their gates where they have any; key/value heads are copied where
    ranks outnumber them."""
    kv = Part(num_kv_heads, head_dim, copied=True)
    return Cut((Part(num_heads, head_dim),) * (1 + gated) + (kv, kv), axis)


def by_groups(axis: str, num_groups: int, *units: int) -> Cut:
    """Parts joined that all have a unit of each group, such as of a key head and the value heads that it serves."""
    return Cut(tuple(Part(num_groups, unit) for unit in units), axis)


def by_columns(axis: str | None, *sizes: int, dim: int = 0) -> Cut:
    """Output features, of several matrices joined."""
    return Cut(tuple(Part(size) for size in sizes), axis, dim)


def by_rows(axis: str | None, num_units: int, unit: int = 1, *, dim: int = 1) -> Cut:
    """Input features: each rank gives its share of a sum."""
    return Cut((Part(num_units, unit),), axis, dim)


def by_slots(axis: str, placement: Placement) -> Cut:
    """Experts, each in one slot or in several. Which are here the placement says, also when its map has changed."""
    return Cut((Part(placement.num_slots),), axis, placement=placement)


def vocabulary(axis: str, vocab_size: int) -> Cut:
    return Cut((Part(vocab_size, ragged=True),), axis)


class Cell(NamedTuple):
    """What is filled at once: one part of a Param, of one expert where experts are stacked."""

    part: int
    expert: int | None = None


class Piece(NamedTuple):
    """A run of a checkpoint tensor, and where in a rank's Param it goes. The tensor of one expert has a dim less than the Param."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]


class Param(nn.Parameter):
    """A rank's share of a weight, empty until filled. `whole` is the shape that all ranks' shares make up, without copies; `plus` is
    added to what a checkpoint has.

    Each cut is of another dim, and at most one of them joins several parts. Experts' gates and ups, two ranks along ep and two
    along moe_tp, as the last of both has them:

        Param(build, (E, 2 * I, H), by_slots("ep", placement), by_columns("moe_tp", I, I, dim=1))

              0  gate  I   up   2I
            0 ┌────────┬────────┐
              │        │        │       local shape [E/2, I, H]: experts from E/2 on (each in the slot of its number),
          E/2 ├────┬───┼────┬───┤       and of each the second half of its gate
              │    │███│    │███│       and the second half of its up
            E └────┴───┴────┴───┘

    Scales of block-quantised weights will be a Param beside their weight, with the same cuts in units of blocks.
    """

    def __new__(cls, build: Build, shape: tuple[int, ...], *cuts: Cut, dtype: torch.dtype | None = None, plus: float = 0.0):
        local = [sum(map(len, _shares(build, cut))) for cut in _every(shape, cuts)]
        return super().__new__(cls, torch.empty(local, dtype=dtype or build.dtype, device=build.device), requires_grad=False)

    def __init__(self, build: Build, shape: tuple[int, ...], *cuts: Cut, dtype: torch.dtype | None = None, plus: float = 0.0):
        self.whole, self.plus = shape, plus
        self.cuts = _every(shape, cuts)
        self._shares = [_shares(build, cut) for cut in self.cuts]
        self._joined = next((cut.dim for cut in self.cuts if len(cut.parts) > 1), len(shape) - 1)

    @property
    def num_parts(self) -> int:
        return len(self.cuts[self._joined].parts)

    @property
    def experts(self) -> list[int] | None:
        """Numbers of the experts that this rank has, each once; None where the Param is not of experts."""
        placement = self.cuts[0].placement
        return None if placement is None else np.unique(placement.here).tolist()

    def cells(self, parts: tuple[int, ...] | None = None, expert: int | None = None) -> list[Cell]:
        """What a tensor of these parts fills here, of one expert or of all; without arguments all that there is to fill."""
        experts = [expert] if expert is not None or self.experts is None else self.experts
        return [Cell(part, each) for each in experts for part in (range(self.num_parts) if parts is None else parts)]

    def tensor_shape(self, parts: tuple[int, ...], expert: int | None = None) -> tuple[int, ...]:
        """Shape of the checkpoint tensor that has these parts, of one expert or of all."""
        shape = list(self.whole)
        shape[self._joined] = sum(self.cuts[self._joined].parts[part].whole for part in parts)
        return tuple(shape if expert is None else shape[1:])

    def fill(self, piece: Piece, run: torch.Tensor) -> int:
        """Take a run of a checkpoint tensor to where a piece says; the bytes that it fills here."""
        target = self.data[piece.target]
        target.copy_(run)
        if self.plus:
            target.add_(self.plus)
        return target.nbytes

    def pieces(self, parts: tuple[int, ...], expert: int | None = None, *, interleaved: bool = False) -> list[Piece]:
        """What this rank takes of such a tensor, part by part. In an interleaved one units of the parts alternate, and each unit
        is a piece; of experts each run of slots is one in which experts follow one another."""
        placement = self.cuts[0].placement
        assert placement is None or not interleaved, "experts' tensors are joined part by part"
        found = []
        for part, piece in zip(parts, self._part_by_part(parts), strict=True):
            if placement is not None:
                found += _slot_by_slot(piece, placement.here, expert)
            else:
                found += self._unit_by_unit(piece, parts, part) if interleaved else [piece]
        return found

    def _part_by_part(self, parts: tuple[int, ...]) -> list[Piece]:
        found, before = [], 0  # rows of the tensor that earlier parts have
        for part in parts:
            source, target = [], []
            for dim, shares in enumerate(self._shares):
                share, skip, start = shares[0], 0, 0
                if dim == self._joined:
                    share, skip, start = shares[part], before, sum(map(len, shares[:part]))
                source.append(slice(skip + share.start, skip + share.stop))
                target.append(slice(start, start + len(share)))
            found.append(Piece(tuple(source), tuple(target)))
            before += self.cuts[self._joined].parts[part].whole
        return found

    def _unit_by_unit(self, piece: Piece, parts: tuple[int, ...], part: int) -> list[Piece]:
        """A part's piece of a tensor in which all parts' first units come first, then their second ones, and so on."""
        every, dim = self.cuts[self._joined].parts, self._joined
        assert len({every[each].num_units for each in parts}) == 1, f"parts without a unit each: {every}"
        unit, group = every[part].unit, sum(every[each].unit for each in parts)
        ahead = sum(every[each].unit for each in parts[: parts.index(part)])  # rows of a group that earlier parts have
        units, start = self._shares[dim][part][::unit], piece.target[dim].start
        found = []
        for number, first in enumerate(units):
            source, target = list(piece.source), list(piece.target)
            row = first // unit * group + ahead
            source[dim] = slice(row, row + unit)
            target[dim] = slice(start + number * unit, start + (number + 1) * unit)
            found.append(Piece(tuple(source), tuple(target)))
        return found


def _slot_by_slot(piece: Piece, here: np.ndarray, expert: int | None) -> list[Piece]:
    """A part's piece of the tensor of one expert, for each of its slots, or of a tensor of all experts, for each run of slots.
    `here` int32 [S]: the expert in each slot of this rank."""
    if expert is not None:
        return [Piece(piece.source[1:], (slice(slot, slot + 1), *piece.target[1:])) for slot in np.flatnonzero(here == expert).tolist()]
    found = []
    for slot, end in pairwise([0, *(np.flatnonzero(np.diff(here) != 1) + 1).tolist(), len(here)]):
        first = int(here[slot])
        found.append(Piece((slice(first, first + end - slot), *piece.source[1:]), (slice(slot, end), *piece.target[1:])))
    return found


def norm_weight(build: Build, size: int) -> Param:
    """Of an RMS norm. A zero-centred one multiplies by 1 + weight, which is kept as one float32 number: rounded to bfloat16 the
    sum would lose most of the weight."""
    return Param(build, (size,), dtype=torch.float32, plus=1.0) if build.spec.zero_centred else Param(build, (size,))


def _every(shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """A cut for every dim; uncut ones are one part that all ranks have."""
    given = {cut.dim: cut for cut in cuts}
    every = tuple(given.get(dim, Cut((Part(size),), dim=dim)) for dim, size in enumerate(shape))
    assert len(given) == len(cuts) and sum(len(cut.parts) > 1 for cut in every) <= 1, f"cuts of {shape}: {cuts}"
    return every


def _shares(build: Build, cut: Cut) -> list[range]:
    rank, size = build.place(cut.axis) if cut.axis else (0, 1)
    return [part.share(rank, size, cut.axis or "") for part in cut.parts]
