"""Signature of gated_rms_norm."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class GatedRmsNorm(Protocol):
    """Sizes a case may name: dim (D)."""

    def __call__(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x, gate [.., D], weight [D] -> [.., D] of x's dtype: rms_norm(x, weight, eps) * silu(gate), that product in float32."""
        ...
