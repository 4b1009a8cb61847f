"""Signature of silu_mul."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class SiluMul(Protocol):
    """Sizes a case may name: intermediate."""

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I], gates in the first I columns -> silu(gate) * up [T, I]; silu is rounded before the product."""
        ...
