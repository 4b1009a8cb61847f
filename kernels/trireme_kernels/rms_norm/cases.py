"""Cases and inputs of rms_norm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.rms_norm.op import RmsNorm

CASES = (
    Case("cpu", torch.float32, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.bfloat16, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.float32, {"hidden": 64, "rows": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 40, "rows": 3}),
    Case("cpu", torch.bfloat16, {"hidden": 96, "rows": 3, "wide_weight": 1}),
)
# Qwen3-8B, and Qwen3.5-35B-A3B, whose norms are zero-centred
BENCH = (
    *(Case("cpu", torch.bfloat16, {"hidden": 4096, "rows": rows}) for rows in (1, 32, 256, 8192)),
    *(Case("cpu", torch.bfloat16, {"hidden": 2048, "rows": rows, "wide_weight": 1}) for rows in (1, 256, 8192)),
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, float]:
    rows, hidden, draw = case.sizes["rows"], case.sizes["hidden"], torch.Generator(case.device).manual_seed(seed)
    x, weight = torch.randn(rows, hidden, generator=draw, device=case.device), torch.randn(hidden, generator=draw, device=case.device)
    return x.to(case.dtype), weight if case.sizes.get("wide_weight") else weight.to(case.dtype), 1e-5


def results(op: RmsNorm, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: RmsNorm, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, weight, _ = inputs
    return Work(2 * x.nbytes + weight.nbytes)
