"""Cases and inputs of delta_step, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.delta_step.op import DeltaStep

_HEADS = {"num_key_heads": 2, "num_value_heads": 4, "key_dim": 32, "value_dim": 32, "kernel": 4}
CASES = (
    Case("cpu", torch.float32, {**_HEADS, "items": 5, "rows": 1}),
    Case("cpu", torch.float32, {**_HEADS, "items": 4, "rows": 3, "held": 4}),
    Case("cpu", torch.float32, {**_HEADS, "key_dim": 24, "value_dim": 40, "kernel": 3, "items": 2, "rows": 4, "held": 4}),
    Case("cpu", torch.bfloat16, {**_HEADS, "num_key_heads": 4, "items": 3, "rows": 2, "held": 2}),
)
# Qwen3.5-35B-A3B: decodes; a token and three drafts after three accepted rows
_QWEN35 = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128, "kernel": 4}
BENCH = tuple(
    Case("cpu", torch.bfloat16, {**_QWEN35, "items": items, "rows": rows, "held": held, "full": 1})
    for rows, held in ((1, 0), (4, 4))
    for items in (1, 8, 32, 256)
)


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """((counts, replays, holds), qkv, a, b, gate, weight, log_decay, dt_bias, norm, eps, inputs, states, held, slots, fresh).
    Items of up to `rows` rows, of which some are replayed and some held where the case has `held`, scattered over twice as many
    slots. Where it is `full`, all items have as many rows, and with `held` replay one less and hold."""
    size, draw = case.sizes, np.random.default_rng(seed)
    key_heads, value_heads, key_dim, value_dim, kernel, items, rows = (
        size[name] for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "kernel", "items", "rows")
    )
    room = size.get("held", 0)
    if size.get("full"):
        counts, replays, holds, fresh = (np.full(items, number) for number in (rows, max(0, room - 1), room > 0, False))
    else:
        counts, replays = draw.integers(1, rows, items, endpoint=True), draw.integers(0, room, items, endpoint=True)
        holds, fresh = draw.random(items) < (0.5 if room else 0), (replays == 0) & (draw.random(items) < 0.5)
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    num_rows, num_slots = int(counts.sum()), 2 * items
    return (
        (counts.astype(np.int32), replays.astype(np.int32), holds.astype(bool)),
        normal(num_rows, channels),
        normal(num_rows, value_heads),
        normal(num_rows, value_heads),
        normal(num_rows, value_heads, value_dim),
        normal(channels, kernel),
        normal(value_heads, dtype=torch.float32),
        normal(value_heads, dtype=torch.float32),
        normal(value_dim),
        1e-6,
        normal(num_slots, kernel - 1, channels),
        normal(num_slots, value_heads, key_dim, value_dim, dtype=torch.float32),
        normal(num_slots, room, channels + 2 * value_heads),
        torch.from_numpy(draw.permutation(num_slots)[:items]).to(case.device),
        torch.from_numpy(fresh).to(case.device),
    )


def results(op: DeltaStep, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes: outputs, and the pools that it wrote."""
    numbers, *tensors = inputs
    tensors[9:12] = pools = [pool.clone() for pool in tensors[9:12]]
    return (op.run(*tensors, plan=op.plan(*numbers)), *pools)


def timed(op: DeltaStep, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats; what is planned once a step is planned before."""
    numbers, *tensors = inputs
    plan = op.plan(*numbers)
    return lambda: op.run(*tensors, plan=plan)


def work(inputs: tuple) -> Work:
    """States dominate: each item's is read and written once. Rows are passed over once, replayed ones too."""
    (counts, replays, holds), qkv, a, b, gate, weight = inputs[:6]
    windows, states, held = inputs[10:13]
    items, row = len(counts), held[0, :1].nbytes
    out = len(qkv) * states.shape[1] * states.shape[3] * qkv.itemsize
    moved = qkv.nbytes + a.nbytes + b.nbytes + gate.nbytes + weight.nbytes + out + 2 * items * (windows[0].nbytes + states[0].nbytes)
    moved += row * int(replays.sum() + (counts * holds).sum())
    return Work(moved, flops=6 * int((counts + replays).sum()) * states[0].numel())
