"""Signature of peer_sum, and how ranks pass numbers to each other through boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Boxes(Protocol):
    """The boxes of a group of W ranks, as one of them sees them. Each rank has one box, which the others write and it alone reads:

        box[turn, from, cell]      `turn` is 0 or 1; `cell` has room for C numbers

    A number is there when it is not EMPTY: no flag, and no fence between numbers and flag. One call fills cell after cell from
    the first on, each of them once; its reader empties it at once. The next call that uses the cell takes the other turn. Why
    two are enough: a rank writes a cell again two calls later; between the two it has read what the others wrote there in the
    call between, and they began that one when they had done with the one before.
    """

    @property
    def place(self) -> int: ...

    @property
    def every(self) -> Sequence[Tensor]:
        """By place, each [2, W, cells, C] of the bits (int16 or int32) of the one dtype that goes through these boxes."""
        ...

    @property
    def addresses(self) -> Tensor:
        """int64 [W + 1], on the device: of `every`, then of `given_up`."""
        ...

    @property
    def turns(self) -> Tensor:
        """int32 [cells], on the device: in how many calls each cell was used."""
        ...

    @property
    def given_up(self) -> Tensor:
        """int32 [1], on the device: not 0 when nobody need wait any longer. What is computed then is nothing. Not in the host's memory:
        looks there wait for each other, 0.2 us each (two H100s), and one rank that looked made the others wait, and look, too."""
        ...


class PeerSum(Protocol):
    """Sizes a case may name: hidden. All ranks make the same calls in the same order; all get the same bits, for float32 sums are
    made in the order of places. All may be captured in a graph. A call waits, on the device, for the others' calls."""

    def sum(self, x: Tensor, boxes: Boxes) -> Tensor:
        """x of at most cells * C numbers -> their sums over the ranks; x itself may be overwritten."""
        ...

    def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """x, residual [T, H], T <= cells, H <= C, weight [H] -> (normed [T, H], residual + the sums of x [T, H]), both new.
        The sum is rounded once, to x's dtype, and the norm reads the rounded one, as add_rms_norm's does."""
        ...

    def best(self, values: Tensor, ids: Tensor, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """values float32 [n], ids int64 [n] from 0 to 2**31 - 1, n <= cells * min(C / 4, 64) -> the highest value of each row over
        the ranks and its id, of equals the lowest: both new."""
        ...


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """Whole numbers as wide."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def empty_of(bits: torch.dtype) -> int:
    """EMPTY: the bits of -0.0, for which ranks write 0.0."""
    return torch.iinfo(bits).min


def empty_key_of(bits: torch.dtype) -> int:
    """EMPTY where a box of such bits is read as int64, as `best` does."""
    one = empty_of(bits).to_bytes(bits.itemsize, "little", signed=True)
    return int.from_bytes(one * (8 // bits.itemsize), "little", signed=True)


def keys_of(values: Tensor, ids: Tensor) -> Tensor:
    """int64 [n] in the order in which `best` prefers: above, a float's bits as a whole number in the same order; below, ids from
    the last to the first. Bit 31 is 0, as it is not in EMPTY."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - ids)
