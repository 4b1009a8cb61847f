"""Cases and inputs of route, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.route.op import Route

CASES = (
    Case("cpu", torch.float32, {"num_experts": 128, "rows": 9, "top_k": 8, "renormalise": 1}),
    Case("cpu", torch.bfloat16, {"num_experts": 60, "rows": 37, "top_k": 4, "renormalise": 0}),
    Case("cpu", torch.bfloat16, {"num_experts": 512, "rows": 3, "top_k": 10, "renormalise": 1}),
    Case("cpu", torch.float32, {"num_experts": 6, "rows": 2, "top_k": 6, "renormalise": 0}),
    Case("cpu", torch.float32, {"num_experts": 8, "rows": 0, "top_k": 2, "renormalise": 1}),
)
# Qwen3-30B-A3B
BENCH = tuple(Case("cpu", torch.bfloat16, {"num_experts": 128, "rows": rows, "top_k": 8, "renormalise": 1}) for rows in (1, 32, 256, 8192))


def inputs(case: Case, seed: int) -> tuple[Tensor, int, bool]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    logits = torch.randn(size["rows"], size["num_experts"], generator=draw, device=case.device).to(case.dtype)
    return logits, size["top_k"], bool(size["renormalise"])


def results(op: Route, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return op(*inputs)


def timed(op: Route, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    logits, top_k, _ = inputs
    return Work(logits.nbytes + len(logits) * top_k * 12)  # a weight and an id each
