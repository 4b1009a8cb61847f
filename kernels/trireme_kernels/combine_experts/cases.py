"""Cases and inputs of combine_experts, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.combine_experts.op import CombineExperts, Shared

CASES = (
    Case("cpu", torch.float32, {"hidden": 50, "rows": 3, "top_k": 2, "shared": 0}),
    Case("cpu", torch.float32, {"hidden": 1300, "rows": 5, "top_k": 4, "shared": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 96, "rows": 7, "top_k": 8, "shared": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 2048, "rows": 2, "top_k": 8, "shared": 0}),
    Case("cpu", torch.float32, {"hidden": 64, "rows": 0, "top_k": 2, "shared": 1}),
)
# Qwen3-30B-A3B and Qwen3.5-35B-A3B
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"hidden": 2048, "rows": rows, "top_k": 8, "shared": shared})
    for shared in (0, 1)
    for rows in (1, 32, 256, 8192)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Shared | None]:
    """A quarter of the pairs are elsewhere: their weight is 0, and their results are nan."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    rows, hidden, top_k = size["rows"], size["hidden"], size["top_k"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=case.device)

    weights = torch.rand(rows, top_k, generator=draw, device=case.device)
    weights = weights.masked_fill_(weights < 0.25, 0)
    results = normal(rows * top_k, hidden).masked_fill_(weights.view(-1, 1) == 0, torch.nan).to(case.dtype)
    if not size["shared"]:
        return results, weights, None
    gate = normal(1, hidden) * hidden**-0.5
    return results, weights, Shared(*(each.to(case.dtype) for each in (normal(rows, hidden), normal(rows, hidden), gate)))


def results(op: CombineExperts, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: CombineExperts, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    results, weights, shared = inputs
    others = 0 if shared is None else sum(each.nbytes for each in shared)
    row = results.shape[1] * results.itemsize
    return Work(int((weights != 0).sum()) * row + weights.nbytes + len(weights) * row + others)
