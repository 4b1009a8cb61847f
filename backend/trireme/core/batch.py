"""Batch: a Step as tensors, made by the runner and read by every block of a forward. The only value here that knows torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of one forward, T in all, item after item.

    `attention` is what the paged_attention op's `plan` made of the step's lengths and page tables; `pages` is where
    each row's key and value go.
    """

    num_rows: int
    tokens: torch.Tensor  # int64 [T]; only stage 0 reads it
    positions: torch.Tensor  # int64 [T]
    pages: torch.Tensor  # int64 [T]: page * PAGE + offset
    attention: Any
    caches: Sequence[tuple[torch.Tensor, ...]]  # what each block's `keeps` asked for, by its cache number
    head_rows: torch.Tensor  # int64 [R]: rows that need logits (sampled ones, and those of prompt logprobs)
