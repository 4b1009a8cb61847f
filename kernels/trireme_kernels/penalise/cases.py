"""Cases and inputs of penalise, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.penalise.op import Penalise

CASES = (Case("cpu", torch.float32, {"vocab": 1000, "rows": 4}),)


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    rows, vocab, draw = case.sizes["rows"], case.sizes["vocab"], torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=draw).to(case.dtype)
    prompt_mask = torch.rand(rows, vocab, generator=draw) < 0.1
    output_counts = torch.randint(-9, 3, (rows, vocab), generator=draw).clamp_(min=0)
    repetition, presence, frequency = 0.5 + torch.rand(rows, generator=draw), *torch.randn(2, rows, generator=draw)
    return tuple(x.to(case.device) for x in (logits, prompt_mask, output_counts, repetition, presence, frequency))


def results(op: Penalise, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)
