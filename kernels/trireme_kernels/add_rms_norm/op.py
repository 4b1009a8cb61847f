"""Signature of add_rms_norm."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class AddRmsNorm(Protocol):
    """Sizes a case may name: hidden."""

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, residual [T, H], weight [H], of x's dtype or float32 -> (normed [T, H], x + residual [T, H]), both new and of x's
        dtype; normed as by rms_norm.

        The norm reads the *rounded* sum: a stage that receives the sum and norms it must get the same bits.
        """
        ...
