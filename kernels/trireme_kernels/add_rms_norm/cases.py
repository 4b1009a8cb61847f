"""Cases and inputs of add_rms_norm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.add_rms_norm.op import AddRmsNorm
from trireme_kernels.case import Case, Work

CASES = (
    Case("cpu", torch.float32, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.bfloat16, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.float32, {"hidden": 64, "rows": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 40, "rows": 3}),
    Case("cpu", torch.bfloat16, {"hidden": 96, "rows": 3, "wide_weight": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 96, "rows": 0}),
)
# Qwen3-8B, and Qwen3.5-35B-A3B, whose norms are zero-centred
BENCH = (
    *(Case("cpu", torch.bfloat16, {"hidden": 4096, "rows": rows}) for rows in (1, 32, 256, 8192)),
    *(Case("cpu", torch.bfloat16, {"hidden": 2048, "rows": rows, "wide_weight": 1}) for rows in (1, 256, 8192)),
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    rows, hidden, draw = case.sizes["rows"], case.sizes["hidden"], torch.Generator(case.device).manual_seed(seed)
    x, residual, weight = (torch.randn(*shape, generator=draw, device=case.device) for shape in ((rows, hidden), (rows, hidden), (hidden,)))
    weight = weight if case.sizes.get("wide_weight") else weight.to(case.dtype)
    return x.to(case.dtype), residual.to(case.dtype), weight, 1e-5


def results(op: AddRmsNorm, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return op(*inputs)


def timed(op: AddRmsNorm, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, residual, weight, _ = inputs
    return Work(2 * x.nbytes + 2 * residual.nbytes + weight.nbytes)
