"""Signature of paged_attention."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

IMPLEMENTATIONS = ("flashinfer", "tl", "reference")
PAGE = 16  # tokens in a page


class PagedAttention(Protocol):
    """Sizes a case must name: num_heads (Hq), num_kv_heads (Hk), head_dim (D); and may: window (0: none).

    Item b has query_lens[b] queries, the last ones of its kv_lens[b] tokens. A query sees the keys up to its own place,
    and with a window only the last `window` of them, its own included.

    On a GPU, `plan` and `run` are called on one stream. Neither waits for it, so that steps can be prepared while others
    compute; any number of plans may be alive, and each stays as it was made for as long as somebody holds it.
    """

    def plan(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> Any:
        """query_lens, kv_lens int32 [B], page_table int32 [B, P] in host memory (entries past an item's last page are not
        read) -> what depends on lengths alone: made once a step, used by `run` in every layer."""
        ...

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: Any, out: Tensor | None = None) -> Tensor:
        """q [T, Hq, D], item after item (T = sum of query_lens), pools [pages, Hk, PAGE, D] of any strides, that already
        hold this step's keys and values -> [T, Hq, D], `out` where one is given. Scores are scaled by 1 / sqrt(D)."""
        ...

    def captured(self, batch_size: int, max_pages: int) -> CapturedDecode | None:
        """Attention of decode steps inside a CUDA graph, for up to `batch_size` items of up to `max_pages` pages each; None
        where the implementation cannot be captured."""
        ...


class CapturedDecode(Protocol):
    """One query an item, `batch_size` items always. A graph holds its launches and the addresses of its buffers:

        attend = op.captured(batch_size=64, max_pages=256)     one for each graph and window, shared by all layers
        attend.plan(kv_lens, page_table)                       once before capture: launches depend on batch_size alone
        with torch.cuda.graph(graph): ... attend.run(q, k_pool, v_pool) in every layer ...

        attend.plan(kv_lens, page_table); graph.replay()       every step, outside of the graph, on the replay's stream

    `plan` writes the buffers in the stream's order, so a replay that still waits in the stream sees what was planned for
    it: steps in flight on one stream share one object.
    """

    def plan(self, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> None:
        """kv_lens int32 [n], page_table int32 [n, P] in host memory, n <= batch_size. Items past n see some key of some
        page that exists: their rows mean nothing."""
        ...

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """q [batch_size, Hq, D] -> [batch_size, Hq, D]."""
        ...
