"""Cases and inputs of sort_by_slot, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.sort_by_slot.op import SortBySlot

CASES = (
    Case("cpu", torch.float32, {"num_slots": 16, "rows": 9, "top_k": 8, "first": 0, "here": 16}),
    Case("cpu", torch.float32, {"num_slots": 12, "rows": 40, "top_k": 3, "first": 4, "here": 5}),
    Case("cpu", torch.float32, {"num_slots": 6, "rows": 700, "top_k": 6, "first": 3, "here": 3}),
    Case("cpu", torch.float32, {"num_slots": 8, "rows": 0, "top_k": 2, "first": 0, "here": 8}),
)
# Qwen3-30B-A3B, alone and on one of two ranks, and Qwen3.5-35B-A3B
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"num_slots": num_slots, "rows": rows, "top_k": 8, "first": 0, "here": here})
    for num_slots, here in ((128, 128), (128, 64), (256, 256))
    for rows in (1, 32, 256, 8192)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, int, int, Tensor]:
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    liking = torch.rand(size["rows"], size["num_slots"], generator=draw, device=case.device)
    weights, slots = liking.topk(size["top_k"])
    return slots, weights, size["first"], size["here"], torch.tensor([size["rows"] * 2 // 3], device=case.device)


def results(op: SortBySlot, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes: of all rows, then of those that are somebody's."""
    slots, given, first, num_slots, num_rows = inputs
    found = []
    for real in (None, num_rows):
        order, begins, weights = op(slots, given, first, num_slots, real)
        found += [order[: int(begins[-1])], begins, weights]
    return tuple(found)


def timed(op: SortBySlot, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    slots, weights, first, num_slots, _ = inputs
    return lambda: op(slots, weights, first, num_slots, None)


def work(inputs: tuple) -> Work:
    slots, weights, *_ = inputs
    return Work(slots.nbytes + 2 * weights.nbytes + slots.numel() * 4)
