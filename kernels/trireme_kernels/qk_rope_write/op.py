"""Signature of qk_rope_write."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class QkRopeWrite(Protocol):
    """Sizes a case may name: num_heads (Hq), num_kv_heads (Hk), head_dim (D)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        k_pool: Tensor,
        v_pool: Tensor,
        pages: Tensor,
    ) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D], cos_sin float32 [L, R] (cosines of the R/2 frequencies, then sines),
        R <= D, positions int64 [T], q_norm and k_norm [D] (of q's dtype or float32) or None, pools [pages, Hk, PAGE, D] of any strides,
        pages int64 [T] (page * PAGE + offset, no two alike) -> q [T, Hq, D].

        Norms each head of q and k where a weight is given (as rms_norm), then turns pairs (i, i + R/2) of its first R
        numbers by the row's angles (the neox form) in float32, and writes k and v into the pools. q, k and v may be views
        of one qkv tensor. A call may have no heads of q, or none of k and v.
        """
        ...
