"""Cases and inputs of count_experts, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.count_experts.op import CountExperts

CASES = (
    Case("cpu", torch.float32, {"num_experts": 128, "rows": 9, "top_k": 8, "real": 9}),
    Case("cpu", torch.float32, {"num_experts": 60, "rows": 400, "top_k": 4, "real": 333}),
    Case("cpu", torch.float32, {"num_experts": 6, "rows": 4, "top_k": 6, "real": 0}),
    Case("cpu", torch.float32, {"num_experts": 8, "rows": 0, "top_k": 2, "real": 0}),
)
# Qwen3-30B-A3B
BENCH = tuple(Case("cpu", torch.bfloat16, {"num_experts": 128, "rows": rows, "top_k": 8, "real": rows}) for rows in (1, 32, 256, 8192))


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    liking = torch.rand(size["rows"], size["num_experts"], generator=draw, device=case.device)
    counts = torch.arange(size["num_experts"], dtype=torch.int32, device=case.device)
    return liking.topk(size["top_k"]).indices, torch.tensor([size["real"]], device=case.device), counts


def results(op: CountExperts, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes: of the rows that are real, then of all as well."""
    experts, num_rows, counts = inputs
    some, every = counts.clone(), counts.clone()
    op(experts, num_rows, some)
    op(experts, None, every)
    return some, every


def timed(op: CountExperts, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    experts, _, counts = inputs
    return Work(experts.nbytes + 2 * counts.nbytes)
