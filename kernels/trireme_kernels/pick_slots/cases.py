"""Cases and inputs of pick_slots, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.pick_slots.op import PickSlots

CASES = (
    Case("cpu", torch.float32, {"num_experts": 128, "rows": 9, "top_k": 8, "most": 3, "real": 9}),
    Case("cpu", torch.float32, {"num_experts": 60, "rows": 400, "top_k": 4, "most": 1, "real": 333}),
    Case("cpu", torch.float32, {"num_experts": 6, "rows": 4, "top_k": 6, "most": 2, "real": 0}),
    Case("cpu", torch.float32, {"num_experts": 8, "rows": 0, "top_k": 2, "most": 2, "real": 0}),
)
# Qwen3-30B-A3B with 32 redundant experts
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"num_experts": 128, "rows": rows, "top_k": 8, "most": 33, "real": rows}) for rows in (1, 32, 256, 8192)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    num_experts, most = size["num_experts"], size["most"]
    liking = torch.rand(size["rows"], num_experts, generator=draw, device=case.device)
    slots = torch.randperm(num_experts * most, generator=draw, device=case.device).view(num_experts, most)
    how_many = torch.randint(1, most + 1, (num_experts, 1), generator=draw, device=case.device)
    loads = torch.arange(num_experts, dtype=torch.int32, device=case.device)
    return liking.topk(size["top_k"]).indices, torch.cat([slots, how_many], 1), torch.tensor([size["real"]], device=case.device), loads


def results(op: PickSlots, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes: with loads of the rows that are real, then of all as well, and without."""
    experts, copies, num_rows, loads = inputs
    some, every = loads.clone(), loads.clone()
    slots = op(experts, copies, num_rows, some), op(experts, copies, None, every), op(experts, copies, num_rows, None)
    return *slots, some, every


def timed(op: PickSlots, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    experts, copies, _, loads = inputs
    return Work(2 * experts.nbytes + copies.nbytes + 2 * loads.nbytes)
