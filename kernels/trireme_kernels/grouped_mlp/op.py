"""Signature of grouped_mlp."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trireme_kernels.sort_by_slot.op import Pairs

IMPLEMENTATIONS = ("tl", "reference")


class GroupedMlp(Protocol):
    """Sizes a case may name: num_slots (S), of_slots (among so many, S or more, pairs are dealt out; the others are on other ranks),
    hidden (H), intermediate (I)."""

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, pairs: Pairs) -> Tensor:
        """x [T, H], gate_up [S, 2 I, H] with gates in the first I rows, down [S, H, I], the pairs of S slots -> [T * k, H]: for
        each pair that is here down(silu(gate) * up) of its row, in the pair's place; other places are undefined.
        """
        ...
