"""Cases and inputs of linear, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.linear.op import Linear

CASES = (
    Case("cpu", torch.float32, {"num_in": 40, "num_out": 24, "rows": 3}),
    Case("cpu", torch.bfloat16, {"num_in": 576, "num_out": 100, "rows": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 576, "num_out": 100, "rows": 1, "bias": 1, "wide": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 208, "num_out": 50, "rows": 2, "bias": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 2064, "num_out": 23, "rows": 2, "wide": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 2048, "num_out": 1, "rows": 16}),
    Case("cpu", torch.bfloat16, {"num_in": 4096, "num_out": 24, "rows": 9, "wide": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "num_out": 136, "rows": 300}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "num_out": 136, "rows": 0, "bias": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "num_out": 136, "rows": 300, "bias": 1, "wide": 1}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "num_out": 0, "rows": 5}),
    Case("cpu", torch.bfloat16, {"num_in": 64, "num_out": 24, "rows": 0, "wide": 1}),
)
_QWEN3_8B = ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096))  # qkv, out, gate and up, down
_HALVES = ((4096, 3072), (2048, 4096), (4096, 12288), (6144, 4096))  # of two ranks
_QWEN3_5_35B = ((2048, 12352), (2048, 9216), (4096, 2048), (2048, 256), (2048, 1024), (512, 2048), (2048, 1))
_HEADS = ((4096, 151936), (2048, 248320))
BENCH = (
    *(
        Case("cpu", torch.bfloat16, {"num_in": num_in, "num_out": num_out, "rows": rows})
        for shapes, counts in ((_QWEN3_8B, (1, 2, 4, 8, 16, 32)), (_HALVES, (1, 16)), (_QWEN3_5_35B, (1, 16)))
        for num_in, num_out in shapes
        for rows in counts
    ),
    *(
        Case("cpu", torch.bfloat16, {"num_in": num_in, "num_out": num_out, "rows": rows, "wide": 1})
        for num_in, num_out in _HEADS
        for rows in (1, 32, 256)
    ),
)
PEER = "reference"  # torch's own product: what others must beat


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=case.device, dtype=case.dtype)

    weight = numbers(size["num_out"], size["num_in"]).mul_(size["num_in"] ** -0.5)
    bias = numbers(size["num_out"]) if size.get("bias") else None
    return numbers(size["rows"], size["num_in"]), weight, bias, torch.float32 if size.get("wide") else None


def results(op: Linear, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: Linear, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, weight, _, dtype = inputs
    out_bytes = x.shape[0] * weight.shape[0] * (dtype or x.dtype).itemsize
    return Work(x.nbytes + weight.nbytes + out_bytes, flops=2 * x.shape[0] * weight.numel())
