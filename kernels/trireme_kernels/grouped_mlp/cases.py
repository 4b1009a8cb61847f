"""Cases and inputs of grouped_mlp, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.grouped_mlp.op import GroupedMlp
from trireme_kernels.sort_by_slot.op import Pairs
from trireme_kernels.sort_by_slot.reference import sort_by_slot

CASES = (
    Case("cpu", torch.float32, {"num_slots": 12, "of_slots": 12, "hidden": 72, "intermediate": 50, "rows": 5, "top_k": 1}),
    Case("cpu", torch.bfloat16, {"num_slots": 5, "of_slots": 5, "hidden": 200, "intermediate": 136, "rows": 35, "top_k": 2}),
    Case("cpu", torch.bfloat16, {"num_slots": 3, "of_slots": 6, "hidden": 64, "intermediate": 128, "rows": 200, "top_k": 3}),
    Case("cpu", torch.float32, {"num_slots": 7, "of_slots": 14, "hidden": 40, "intermediate": 24, "rows": 20, "top_k": 6}),
    Case("cpu", torch.bfloat16, {"num_slots": 4, "of_slots": 4, "hidden": 48, "intermediate": 16, "rows": 0, "top_k": 2}),
)
# Qwen3-30B-A3B, alone and on one of two ranks, and Qwen3.5-35B-A3B
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"num_slots": here, "of_slots": slots, "hidden": 2048, "intermediate": width, "rows": rows, "top_k": 8})
    for slots, here, width in ((128, 128, 768), (128, 64, 768), (256, 256, 512))
    for rows in (1, 32, 256, 8192)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """Slots are very unevenly full, the first one and often others empty."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    num_slots, hidden, width, rows, top_k = (size[name] for name in ("num_slots", "hidden", "intermediate", "rows", "top_k"))
    share = torch.rand(size["of_slots"], generator=draw, device=case.device) ** 3
    share[0] = 0
    liking = torch.rand(max(1, rows), size["of_slots"], generator=draw, device=case.device) ** (1 / share.clamp(min=1e-3))
    weights, slots = liking[:rows].topk(top_k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=case.device, dtype=case.dtype)

    return (
        normal(rows, hidden),
        normal(num_slots, 2 * width, hidden).mul_(hidden**-0.5),
        normal(num_slots, hidden, width).mul_(width**-0.5),
        sort_by_slot(slots, weights, 0, num_slots, None),
    )


def results(op: GroupedMlp, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes: results of pairs that are here."""
    order, begins, _ = inputs[-1]
    return (op(*inputs)[order[: int(begins[-1])].long()],)


def timed(op: GroupedMlp, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    x, gate_up, down, pairs = inputs
    used, num_pairs = int((pairs.begins.diff() > 0).sum()), int(pairs.begins[-1])
    read = used * (gate_up.nbytes + down.nbytes) // len(gate_up)
    per_pair = gate_up.shape[1] * gate_up.shape[2] + down.shape[1] * down.shape[2]
    inner = num_pairs * down.shape[2] * x.itemsize
    return Work(x.nbytes + read + 2 * inner + num_pairs * x.shape[1] * x.itemsize, flops=2 * num_pairs * per_pair)
