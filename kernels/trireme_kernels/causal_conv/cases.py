"""Cases and inputs of causal_conv, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.causal_conv.op import CausalConv

CASES = (
    Case("cpu", torch.float32, {"channels": 96, "kernel": 4, "items": 5, "max_rows": 9}),
    Case("cpu", torch.bfloat16, {"channels": 96, "kernel": 4, "items": 3, "max_rows": 70}),
    Case("cpu", torch.float32, {"channels": 40, "kernel": 3, "items": 1, "max_rows": 1}),
)
# Qwen3.5-35B-A3B: prompts
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"channels": 8192, "kernel": 4, "items": items, "max_rows": rows, "full": 1})
    for items, rows in ((1, 256), (1, 2048), (1, 8192), (8, 1024))
)


def inputs(case: Case, seed: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """(counts, x, left, weight); items of up to max_rows rows, or where the case is `full` of as many."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    channels, kernel, items, most = (size[name] for name in ("channels", "kernel", "items", "max_rows"))
    counts = np.full(items, most) if size.get("full") else np.random.default_rng(seed).integers(0, most, items, endpoint=True)
    shapes = (int(counts.sum()), channels), (items, kernel - 1, channels), (channels, kernel)
    x, left, weight = (torch.randn(shape, generator=draw, device=case.device).to(case.dtype) for shape in shapes)
    return counts.astype(np.int32), x, left, weight


def results(op: CausalConv, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    counts, *tensors = inputs
    return (op.run(*tensors, plan=op.plan(counts)),)


def timed(op: CausalConv, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats; what is planned once a step is planned before."""
    counts, *tensors = inputs
    plan = op.plan(counts)
    return lambda: op.run(*tensors, plan=plan)


def work(inputs: tuple) -> Work:
    _, x, left, weight = inputs
    return Work(2 * x.nbytes + left.nbytes + weight.nbytes)
