"""Batch: a Step as tensors, made by the runner and read by every block of a forward. The only value here that knows torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(queries [N, Hq, D], keys, values: pools) -> [N, Hq, D], of one step's lengths and page tables."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward that this rank attends to: all T of the step, or its N of them under context parallelism.

    `attention` is what the paged_attention op's `plan` made of the rows' lengths and page tables, by window; `pages` is
    where each row's key and value go, and `shared` where those of other ranks' rows go.
    """

    tokens: torch.Tensor  # int64 [N]; only stage 0 reads it
    positions: torch.Tensor  # int64 [N]
    pages: torch.Tensor  # int64 [N]: page * PAGE + offset
    attention: Mapping[int, Attend]
    shared: Any  # parallel.context.Shared, or None where this rank has all rows
    caches: Sequence[tuple[torch.Tensor, ...]]  # what each block's `keeps` asked for, by its cache number
    head_rows: torch.Tensor  # int64 [R]: of the step's T rows, those that need logits (sampled ones, and those of prompt logprobs)
