"""Param: a weight described where it is used: its whole shape, and how ranks share it. Filling it is weights/load's work."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from trireme.core.refusal import Refusal

if TYPE_CHECKING:
    from trireme.layers.block import Build


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint among those joined along a Param's cut dim: `num_units` units (heads, columns) of `unit`
    rows that stay together."""

    num_units: int
    unit: int = 1
    copied: bool = False  # ranks beyond num_units get copies (key/value heads)
    ragged: bool = False  # the last rank may have fewer (vocabulary)

    @property
    def whole(self) -> int:
        return self.num_units * self.unit

    def share(self, rank: int, size: int) -> range:
        """The rows of the whole part that rank `rank` of `size` has. Refusal where units cannot be dealt out."""
        if self.copied and size > self.num_units and size % self.num_units == 0:
            start, count = rank // (size // self.num_units), 1
        elif self.num_units % size and not self.ragged:
            raise Refusal(
                f"tp={size} does not divide {self.num_units} units of a weight",
                why="each rank needs whole heads, or a whole copy of one",
                fix=f"use a tp that divides {self.num_units}",
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


def by_heads(axis: str, num_heads: int, num_kv_heads: int, head_dim: int) -> Cut:
    """Query, key and value rows joined; key/value heads are copied where ranks outnumber them."""
    kv = Part(num_kv_heads, head_dim, copied=True)
    return Cut((Part(num_heads, head_dim), kv, kv), axis)


def by_columns(axis: str, *sizes: int) -> Cut:
    """Output features, of several matrices joined."""
    return Cut(tuple(Part(size) for size in sizes), axis)


def by_rows(axis: str, num_units: int, unit: int = 1) -> Cut:
    """Input features: each rank gives its share of a sum."""
    return Cut((Part(num_units, unit),), axis, dim=1)


def vocabulary(axis: str, vocab_size: int) -> Cut:
    return Cut((Part(vocab_size, ragged=True),), axis)


class Piece(NamedTuple):
    """A rank's run of one checkpoint tensor along `dim`, and where in its Param it goes."""

    dim: int
    source: range
    target: range


class Param(nn.Parameter):
    """A rank's share of a weight, empty until loaded. `whole` is the shape that all ranks' shares make up."""

    def __new__(cls, build: Build, shape: tuple[int, ...], cut: Cut | None = None):
        cut = cut or Cut((Part(shape[0]),))
        local = list(shape)
        local[cut.dim] = sum(len(share) for share in _shares(build, cut))
        return super().__new__(cls, torch.empty(local, dtype=build.dtype, device=build.device), requires_grad=False)

    def __init__(self, build: Build, shape: tuple[int, ...], cut: Cut | None = None):
        self.whole = shape
        self.cut = cut or Cut((Part(shape[0]),))
        self._shares = _shares(build, self.cut)

    @property
    def num_parts(self) -> int:
        return len(self.cut.parts)

    def part_shape(self, part: int) -> tuple[int, ...]:
        """Shape of the checkpoint tensor that this part comes from."""
        dim = self.cut.dim
        return (*self.whole[:dim], self.cut.parts[part].whole, *self.whole[dim + 1 :])

    def piece(self, part: int) -> Piece:
        start = sum(len(share) for share in self._shares[:part])
        return Piece(self.cut.dim, self._shares[part], range(start, start + len(self._shares[part])))


def _shares(build: Build, cut: Cut) -> list[range]:
    rank, size = build.place(cut.axis) if cut.axis else (0, 1)
    return [part.share(rank, size) for part in cut.parts]
