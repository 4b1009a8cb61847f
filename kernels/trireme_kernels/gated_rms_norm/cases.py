"""Cases and inputs of gated_rms_norm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.gated_rms_norm.op import GatedRmsNorm

CASES = (
    Case("cpu", torch.float32, {"dim": 128, "heads": 4, "rows": 5}),
    Case("cpu", torch.bfloat16, {"dim": 128, "heads": 4, "rows": 5}),
    Case("cpu", torch.float32, {"dim": 24, "heads": 3, "rows": 7}),
)
# Qwen3.5-35B-A3B
BENCH = tuple(Case("cpu", torch.bfloat16, {"dim": 128, "heads": 32, "rows": rows}) for rows in (1, 32, 256, 8192))


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The gate is a view of a wider projection."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    shape = size["rows"], size["heads"], size["dim"]
    x, wide = (torch.randn(rows, *shape[1:], generator=draw, device=case.device).to(case.dtype) for rows in (shape[0], 2 * shape[0]))
    weight = torch.randn(size["dim"], generator=draw, device=case.device).to(case.dtype)
    return x, wide.view(shape[0], -1)[:, : shape[1] * shape[2]].view(shape), weight, 1e-6


def results(op: GatedRmsNorm, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: GatedRmsNorm, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, _, weight, _ = inputs
    return Work(3 * x.nbytes + weight.nbytes)
