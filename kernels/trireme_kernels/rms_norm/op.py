"""Signature of rms_norm."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class RmsNorm(Protocol):
    """Sizes a case may name: hidden."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H], weight [H], of x's dtype or float32 -> [T, H] of x's dtype: x / sqrt(mean(x^2) + eps) in float32, rounded to
        the weight's dtype, times weight, rounded to x's. (Llama multiplies what is rounded; zero-centred norms round once.)"""
        ...
