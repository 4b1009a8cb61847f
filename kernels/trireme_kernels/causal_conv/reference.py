"""causal_conv in PyTorch; its definition."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.causal_conv.op import CausalConv


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CausalConv:
    return Reference()


class Reference:
    """One convolution over all items, each behind its own inputs to the left; what straddles two items is dropped."""

    def plan(self, counts: np.ndarray) -> list[int]:
        return np.asarray(counts).tolist()

    def run(self, x: Tensor, left: Tensor, weight: Tensor, plan: list[int]) -> Tensor:  # [N, C], [I, K - 1, C], [C, K] -> [N, C]
        if not plan:
            return x
        line = torch.cat(list(chain.from_iterable(zip(left, x.split(plan), strict=True))))
        straddling = [left.shape[1]] * len(plan)
        parts = convolve(line, weight).split(list(chain.from_iterable(zip(plan, straddling, strict=True)))[:-1])
        return torch.cat(parts[::2])


def convolve(line: Tensor, weight: Tensor) -> Tensor:  # [.., K - 1 + T, C], [C, K] -> [.., T, C]
    """SiLU of the depthwise convolution, of rows that have K - 1 rows before them."""
    taps, wide = weight.float().unbind(1), line.float()
    num_rows = line.shape[-2] - len(taps) + 1
    total = wide.narrow(-2, 0, num_rows) * taps[0]
    for place, tap in enumerate(taps[1:], start=1):
        total.addcmul_(wide.narrow(-2, place, num_rows), tap)
    return F.silu(total).to(line.dtype)
