"""Batch: a Step as tensors, made by the runner and read by every block of a forward. The only value here that knows torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Attend = Callable[..., torch.Tensor]
"""(queries [N, Hq, D], keys, values: pools) -> [N, Hq, D], of one step's lengths and page tables. What was planned for a step also takes
`out`, where the result is to stand."""


@dataclass(frozen=True)
class Items:
    """The I items of a step, as blocks with a state for each request read them: whole items, also under context parallelism.

    An item's states take `replays` rows that its slot held before, then this step's rows; where it `holds`, those are kept
    aside instead, since they are a token and drafts of which some may not stand.

        state --replays--> state --counts--> state          prompt rows, a decode
        state --replays--> state;  rows --> what is held    a token and drafts
    """

    slots: torch.Tensor  # int64 [I], on the device
    fresh: torch.Tensor  # bool [I], on the device: it begins at position 0, so its states are zero
    counts: np.ndarray  # int32 [I], above zero
    replays: np.ndarray  # int32 [I]
    holds: np.ndarray  # bool [I]
    plans: dict[object, Any]  # what ops made of these numbers, once a step, by the op


@dataclass(frozen=True)
class Batch:
    """Rows of one forward that this rank attends to: all T of the step, or its N of them under context parallelism.

    `attention` is what the paged_attention op's `plan` made of the rows' lengths and page tables, by window; `pages` is
    where each row's key and value go, and `shared` has the same of all ranks' rows.
    """

    tokens: torch.Tensor  # int64 [N]; only stage 0 reads it
    positions: torch.Tensor  # int64 [N]
    pages: torch.Tensor  # int64 [N]: page * PAGE + offset
    attention: Mapping[int, Attend]
    shared: Any  # parallel.context.Shared, or None where this rank has all rows
    caches: Sequence[tuple[torch.Tensor, ...]]  # what each block's `keeps` asked for, by its cache number
    items: Items | None = None  # where a block keeps states
    routed: list[torch.Tensor] | None = None  # where asked for, each mixture adds its rows' experts: int16 [rows, experts of a row]
    attend_heads: Callable[[], Mapping[int, Attend]] | None = None  # `attention` of the deal's heads alone, planned where that pays
    num_sampled: int | None = None  # of the deal's heads the first so many are sampled; None: all
    num_rows: torch.Tensor | None = None  # int64 [1]: where rows of nobody fill up a CUDA graph, from which on all are nobody's
