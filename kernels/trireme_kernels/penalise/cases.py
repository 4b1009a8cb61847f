"""Cases and inputs of penalise, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.penalise.op import Penalise

CASES = (Case("cpu", torch.float32, {"vocab": 1000, "rows": 4}),)
# Qwen3
BENCH = tuple(Case("cpu", torch.float32, {"vocab": 151936, "rows": rows}) for rows in (1, 32, 256))


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    rows, vocab, draw = case.sizes["rows"], case.sizes["vocab"], torch.Generator(case.device).manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=draw, device=case.device).to(case.dtype)
    prompt_mask = torch.rand(rows, vocab, generator=draw, device=case.device) < 0.1
    output_counts = torch.randint(-9, 3, (rows, vocab), generator=draw, device=case.device, dtype=torch.int32).clamp_(min=0)
    repetition = 0.5 + torch.rand(rows, generator=draw, device=case.device)
    presence, frequency = torch.randn(2, rows, generator=draw, device=case.device)
    return logits, prompt_mask, output_counts, repetition, presence, frequency


def results(op: Penalise, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: Penalise, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    logits, prompt_mask, output_counts = inputs[:3]
    return Work(2 * logits.nbytes + prompt_mask.nbytes + output_counts.nbytes)
