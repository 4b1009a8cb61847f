"""Signature of sigmoid_mul."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class SigmoidMul(Protocol):
    """Sizes a case may name: num_heads (H), head_dim (D)."""

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [T, H, D] -> x * sigmoid(gate) [T, H, D]; the sigmoid is rounded before the product."""
        ...
