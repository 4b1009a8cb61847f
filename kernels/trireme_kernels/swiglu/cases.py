"""Cases and inputs of swiglu, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.swiglu.op import SwiGlu

CASES = (
    Case("cpu", torch.float32, {"num_in": 40, "intermediate": 24, "rows": 3}),
    Case("cpu", torch.bfloat16, {"num_in": 576, "intermediate": 100, "rows": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 576, "intermediate": 101, "rows": 1, "bias": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 208, "intermediate": 50, "rows": 2, "bias": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 208, "intermediate": 136, "rows": 50}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "intermediate": 136, "rows": 300}),
    Case("cpu", torch.bfloat16, {"num_in": 80, "intermediate": 136, "rows": 4100}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "intermediate": 136, "rows": 4100, "bias": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "intermediate": 0, "rows": 5}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "intermediate": 24, "rows": 0}),
)
# Qwen3-8B, whole and of two ranks
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"num_in": 4096, "intermediate": width, "rows": rows})
    for width in (12288, 6144)
    for rows in (1, 32, 256, 4096, 8192)
)
PEER = "reference"  # two ops, which others must beat


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=case.device, dtype=case.dtype)

    weight = numbers(2 * size["intermediate"], size["num_in"]).mul_(size["num_in"] ** -0.5)
    return numbers(size["rows"], size["num_in"]), weight, numbers(2 * size["intermediate"]) if size.get("bias") else None


def results(op: SwiGlu, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: SwiGlu, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, weight, _ = inputs
    return Work(x.nbytes + weight.nbytes + len(x) * len(weight) // 2 * x.itemsize, flops=2 * len(x) * weight.numel())
