"""Signature of paged_attention."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")
PAGE = 16  # tokens in a page


class PagedAttention(Protocol):
    """Sizes a case must name: num_heads (Hq), num_kv_heads (Hk), head_dim (D); and may: window (0: none).

    Item b has query_lens[b] queries, the last ones of its kv_lens[b] tokens. A query sees the keys up to its own place,
    and with a window only the last `window` of them, its own included.
    """

    def plan(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> Any:
        """query_lens, kv_lens int32 [B], page_table int32 [B, P] (entries past an item's last page are not read) -> what
        depends on lengths alone: made once a step, used by `run` in every layer."""
        ...

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: Any) -> Tensor:
        """q [T, Hq, D], item after item (T = sum of query_lens), pools [pages, Hk, PAGE, D] of any strides, that already
        hold this step's keys and values -> [T, Hq, D]. Scores are scaled by 1 / sqrt(D)."""
        ...
