"""Cases and inputs of gated_delta, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.gated_delta.gates import gates
from trireme_kernels.gated_delta.op import GatedDelta

_HEADS = {"num_key_heads": 2, "num_value_heads": 4, "key_dim": 32, "value_dim": 32}
CASES = (
    Case("cpu", torch.float32, {**_HEADS, "items": 4, "max_rows": 150}),
    Case("cpu", torch.float32, {**_HEADS, "value_dim": 80, "items": 3, "max_rows": 40}),
    Case("cpu", torch.bfloat16, {**_HEADS, "num_key_heads": 4, "items": 2, "max_rows": 130}),
    Case("cpu", torch.bfloat16, {"num_key_heads": 2, "num_value_heads": 4, "key_dim": 128, "value_dim": 256, "items": 2, "max_rows": 70}),
)
# Qwen3.5-35B-A3B: prompts, and under context parallelism, where values carry the key's dims too
_QWEN35 = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128}
BENCH = tuple(
    Case("cpu", torch.bfloat16, {**_QWEN35, "value_dim": value_dim, "items": items, "max_rows": rows, "full": 1})
    for value_dim, items, rows in ((128, 1, 256), (128, 1, 2048), (128, 1, 8192), (128, 8, 1024), (256, 1, 8192))
)


def inputs(case: Case, seed: int) -> tuple[np.ndarray, *tuple[Tensor, ...]]:
    """(counts, q, k, v, g, beta, initial); items of up to max_rows rows, or where the case is `full` of as many."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    key_heads, value_heads, key_dim, value_dim, items, most = (
        size[name] for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "items", "max_rows")
    )
    counts = np.full(items, most) if size.get("full") else np.random.default_rng(seed).integers(0, most, items, endpoint=True)
    rows = int(counts.sum())

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=case.device)

    q, k, v = normal(rows, key_heads, key_dim), normal(rows, key_heads, key_dim), normal(rows, value_heads, value_dim)
    g, beta = gates(normal(rows, value_heads), normal(rows, value_heads), normal(value_heads), normal(value_heads))
    initial = normal(items, value_heads, key_dim, value_dim)
    return counts.astype(np.int32), q.to(case.dtype), k.to(case.dtype), v.to(case.dtype), g, beta, initial


def results(op: GatedDelta, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    counts, *tensors = inputs
    return op.run(*tensors, plan=op.plan(counts))


def timed(op: GatedDelta, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats; what is planned once a step is planned before."""
    counts, *tensors = inputs
    plan = op.plan(counts)
    return lambda: op.run(*tensors, plan=plan)


def work(inputs: tuple) -> Work:
    """Each row reads a state with its query and its key, and writes its value there."""
    _, q, k, v, g, beta, initial = inputs
    state = k.shape[-1] * v.shape[-1]
    moved = q.nbytes + k.nbytes + 2 * v.nbytes + g.nbytes + beta.nbytes + 2 * initial.nbytes
    return Work(moved, flops=6 * v.shape[0] * v.shape[1] * state)
