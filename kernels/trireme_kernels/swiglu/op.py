"""Signature of swiglu."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class SwiGlu(Protocol):
    """Sizes a case may name: num_in (K), intermediate (I)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K], weight [2 I, K], gates first, bias [2 I] or None -> silu(x @ gates.T) * (x @ ups.T) [T, I].

        Both products and silu are rounded, as linear and silu_mul round them. A weight is constant, as linear's is.
        """
        ...
