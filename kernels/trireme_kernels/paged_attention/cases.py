"""Cases and inputs of paged_attention, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.paged_attention.op import PAGE, PagedAttention

_DEMO = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
_MHA = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32}
_MQA = {"num_heads": 6, "num_kv_heads": 1, "head_dim": 80}
CASES = (
    Case("cpu", torch.float32, {**_DEMO, "items": 5, "max_queries": 1, "max_keys": 100}),
    Case("cpu", torch.float32, {**_DEMO, "items": 4, "max_queries": 90, "max_keys": 150}),
    Case("cpu", torch.bfloat16, {**_DEMO, "items": 4, "max_queries": 40, "max_keys": 100}),
    Case("cpu", torch.float32, {**_MHA, "items": 3, "max_queries": 30, "max_keys": 120, "window": 20}),
    Case("cpu", torch.bfloat16, {**_MHA, "items": 6, "max_queries": 1, "max_keys": 120, "window": 33}),
    Case("cpu", torch.float32, {**_MQA, "items": 3, "max_queries": 20, "max_keys": 70}),
)


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """(query_lens, kv_lens, page_table, q, k_pool, v_pool): lengths up to the case's, a third of the items decoding,
    pages scattered, pools kv head outermost, as on a CPU."""
    size, draw = case.sizes, np.random.default_rng(seed)
    items = size["items"]
    query_lens = np.where(draw.random(items) < 1 / 3, 1, draw.integers(1, size["max_queries"], items, endpoint=True)).astype(np.int32)
    kv_lens = draw.integers(query_lens, size["max_keys"], endpoint=True).astype(np.int32)
    width = -(-size["max_keys"] // PAGE)
    page_table = draw.permutation(items * width).reshape(items, width).astype(np.int32)
    torch_draw = torch.Generator().manual_seed(seed)
    q = torch.randn(int(query_lens.sum()), size["num_heads"], size["head_dim"], generator=torch_draw).to(case.device, case.dtype)
    k_pool, v_pool = (
        torch.randn(size["num_kv_heads"], items * width, PAGE, size["head_dim"], generator=torch_draw)
        .to(case.device, case.dtype)
        .transpose(0, 1)
        for _ in "kv"
    )
    return query_lens, kv_lens, page_table, q, k_pool, v_pool


def results(op: PagedAttention, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    query_lens, kv_lens, page_table, q, k_pool, v_pool = inputs
    return (op.run(q, k_pool, v_pool, op.plan(query_lens, kv_lens, page_table)),)
