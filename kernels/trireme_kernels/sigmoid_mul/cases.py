"""Cases and inputs of sigmoid_mul, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.sigmoid_mul.op import SigmoidMul

CASES = (
    Case("cpu", torch.float32, {"num_heads": 4, "head_dim": 20, "rows": 3}),
    Case("cpu", torch.bfloat16, {"num_heads": 9, "head_dim": 128, "rows": 2}),
    Case("cpu", torch.bfloat16, {"num_heads": 9, "head_dim": 128, "rows": 0}),
)
# Qwen3.5-35B-A3B
BENCH = tuple(Case("cpu", torch.bfloat16, {"num_heads": 16, "head_dim": 256, "rows": rows}) for rows in (1, 32, 256, 8192))


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """The gate is a view of a wider projection."""
    draw = torch.Generator(case.device).manual_seed(seed)
    shape = case.sizes["rows"], case.sizes["num_heads"], case.sizes["head_dim"]
    x, wide = (torch.randn(shape[0], times * shape[1], shape[2], generator=draw, device=case.device).to(case.dtype) for times in (1, 2))
    return x, wide[:, shape[1] :]


def results(op: SigmoidMul, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: SigmoidMul, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    return Work(3 * inputs[0].nbytes)
