"""Cases and inputs of sample, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.sample.op import Sample

CASES = tuple(
    Case("cpu", torch.float32, {"vocab": 1000, "rows": 12, "drawn": drawn, "filtered": filtered, "part": part})
    for drawn, filtered, part in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1))
)


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    """Greedy rows unless `drawn`; with `filtered`, rows of every mix of top-k, top-p and min-p; with `part`, of a third of
    a larger vocabulary."""
    size, draw = case.sizes, torch.Generator().manual_seed(seed)
    rows = size["rows"]
    kind = torch.arange(rows) % 8 if size["filtered"] else torch.zeros(rows, dtype=torch.int64)
    logits = torch.randn(rows, size["vocab"], generator=draw).mul_(3.0)
    temperature = 0.5 + torch.rand(rows, generator=draw) if size["drawn"] else torch.zeros(rows)
    top_k = torch.where(kind & 1 > 0, 50, 0)
    top_p = torch.where(kind & 2 > 0, 0.9, 1.0)
    min_p = torch.where(kind & 4 > 0, 0.05, 0.0)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw), torch.randint(0, 8192, (rows,), generator=draw)
    given = [logits, temperature, top_k, top_p, min_p, seeds, positions]
    if size["part"]:
        given.append(torch.arange(size["vocab"])[None] * 3 + 1)
    return tuple(x.to(case.device) for x in given)


def results(op: Sample, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return op(*inputs)
