"""Cases and inputs of sample, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.sample.op import Sample

CASES = tuple(
    Case("cpu", torch.float32, {"vocab": vocab, "rows": 12, "drawn": drawn, "filtered": filtered, "part": part})
    for vocab, drawn, filtered, part in ((1000, 0, 0, 0), (2500, 1, 0, 0), (1000, 1, 1, 0), (1000, 1, 0, 1), (2500, 1, 1, 1))
)
# Qwen3: greedy, drawn from all, and with every mix of filters
BENCH = tuple(
    Case("cpu", torch.float32, {"vocab": 151936, "rows": rows, "drawn": drawn, "filtered": filtered, "part": 0})
    for drawn, filtered in ((0, 0), (1, 0), (1, 1))
    for rows in (1, 32, 256)
)


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    """Greedy rows unless `drawn`; with `filtered`, rows of every mix of top-k, top-p and min-p; with `part`, of a third of
    a larger vocabulary."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    rows = size["rows"]
    kind = torch.arange(rows, device=case.device) % 8 if size["filtered"] else torch.zeros(rows, dtype=torch.int64, device=case.device)
    logits = torch.randn(rows, size["vocab"], generator=draw, device=case.device).mul_(3.0)
    temperature = torch.rand(rows, generator=draw, device=case.device).add_(0.5).mul_(size["drawn"])
    top_k = torch.where(kind & 1 > 0, 50, 0)
    top_p = torch.where(kind & 2 > 0, 0.9, 1.0)
    min_p = torch.where(kind & 4 > 0, 0.05, 0.0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw, device=case.device)
    positions = torch.randint(0, 8192, (rows,), generator=draw, device=case.device)
    given = [logits, temperature, top_k, top_p, min_p, seeds, positions]
    if size["part"]:
        given.append(torch.arange(size["vocab"], device=case.device)[None] * 3 + 1)
    return tuple(given)


def results(op: Sample, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return op(*inputs)


def timed(op: Sample, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    return Work(inputs[0].nbytes)
