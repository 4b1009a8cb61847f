"""Cases and inputs of grouped_linear, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.grouped_linear.op import GroupedLinear

CASES = (
    Case("cpu", torch.float32, {"num_slots": 12, "num_in": 72, "num_out": 50, "rows": 5, "spare": 0}),
    Case("cpu", torch.bfloat16, {"num_slots": 5, "num_in": 200, "num_out": 136, "rows": 70, "spare": 0}),
    Case("cpu", torch.bfloat16, {"num_slots": 3, "num_in": 64, "num_out": 128, "rows": 300, "spare": 0}),
    Case("cpu", torch.float32, {"num_slots": 7, "num_in": 40, "num_out": 24, "rows": 20, "spare": 100}),
    Case("cpu", torch.bfloat16, {"num_slots": 4, "num_in": 48, "num_out": 16, "rows": 0, "spare": 9}),
    Case("cpu", torch.float32, {"num_slots": 4, "num_in": 48, "num_out": 16, "rows": 0, "spare": 0}),
)
# Gate and up, and down, of Qwen3-30B-A3B: 8 rows a token
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"num_slots": 128, "num_in": num_in, "num_out": num_out, "rows": rows, "spare": 0})
    for num_in, num_out in ((2048, 1536), (768, 2048))
    for rows in (8, 256, 2048, 65536)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, counts): `rows` rows dealt to slots very unevenly, the first slot and often others empty; then `spare`
    rows of no slot, which are nan."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    share = torch.rand(size["num_slots"], generator=draw, device=case.device) ** 3
    share[0] = 0
    slots = torch.multinomial(share, max(1, size["rows"]), replacement=True, generator=draw)[: size["rows"]]
    counts = slots.bincount(minlength=size["num_slots"])
    x = torch.randn(size["rows"] + size["spare"], size["num_in"], generator=draw, device=case.device)
    x[size["rows"] :] = torch.nan
    shape = size["num_slots"], size["num_out"], size["num_in"]
    weight = torch.randn(shape, generator=draw, device=case.device) * size["num_in"] ** -0.5
    return x.to(case.dtype), weight.to(case.dtype), counts


def results(op: GroupedLinear, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    x, weight, counts = inputs
    return (op.run(x, weight, op.plan(counts, len(x))),)


def timed(op: GroupedLinear, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats; what is planned once a layer is planned before."""
    x, weight, counts = inputs
    plan = op.plan(counts, len(x))
    return lambda: op.run(x, weight, plan)


def work(inputs: tuple) -> Work:
    x, weight, counts = inputs
    num_slots, num_out, num_in = weight.shape
    read = int((counts > 0).sum()) * weight.nbytes // num_slots
    return Work(x.nbytes + read + len(x) * num_out * x.itemsize, flops=2 * int(counts.sum()) * num_in * num_out)
