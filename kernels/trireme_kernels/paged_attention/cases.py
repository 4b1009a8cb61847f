"""Cases and inputs of paged_attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.paged_attention.op import PAGE, PagedAttention

_DEMO = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
_MHA = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32}
_MQA = {"num_heads": 6, "num_kv_heads": 1, "head_dim": 80}
_QWEN3_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
_QWEN3_30B = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
CASES = (
    Case("cpu", torch.float32, {**_DEMO, "items": 5, "max_queries": 1, "max_keys": 100}),
    Case("cpu", torch.float32, {**_DEMO, "items": 4, "max_queries": 90, "max_keys": 150}),
    Case("cpu", torch.bfloat16, {**_DEMO, "items": 4, "max_queries": 40, "max_keys": 100}),
    Case("cpu", torch.float32, {**_MHA, "items": 3, "max_queries": 30, "max_keys": 120, "window": 20}),
    Case("cpu", torch.bfloat16, {**_MHA, "items": 6, "max_queries": 1, "max_keys": 120, "window": 33}),
    Case("cpu", torch.float32, {**_MQA, "items": 3, "max_queries": 20, "max_keys": 70}),
    Case("cpu", torch.bfloat16, {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "items": 5, "max_queries": 50, "max_keys": 200}),
    Case("cpu", torch.bfloat16, {"num_heads": 8, "num_kv_heads": 1, "head_dim": 128, "items": 9, "max_queries": 1, "max_keys": 300}),
    Case("cpu", torch.bfloat16, {**_QWEN3_8B, "items": 6, "max_queries": 40, "max_keys": 90, "decodes": 4, "window": 33}),
)
# Decodes at 1K and 8K tokens, whole prompts, a chunk with decodes before it
BENCH = tuple(
    Case("cpu", torch.bfloat16, {**heads, "items": items, "max_queries": queries, "max_keys": keys, "decodes": decodes})
    for heads, items, queries, keys, decodes in (
        *((_QWEN3_8B, items, 1, 1024, items) for items in (1, 32, 128, 256)),
        (_QWEN3_8B, 4, 1, 8192, 4),
        (_QWEN3_30B, 128, 1, 1024, 128),
        (_QWEN3_8B, 8, 1024, 1024, 0),
        (_QWEN3_8B, 1, 8192, 8192, 0),
        (_QWEN3_8B, 65, 2048, 2048, 64),
    )
)


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """(query_lens, kv_lens, page_table, q, k_pool, v_pool): pages scattered, pools kv head outermost, as on a CPU. A case
    that names `decodes` has as many items of one query, then items of the most queries, all with the most keys. Otherwise
    lengths are up to the case's, and a third of the items decode."""
    size, draw = case.sizes, np.random.default_rng(seed)
    items = size["items"]
    if "decodes" in size:
        query_lens = np.where(np.arange(items) < size["decodes"], 1, size["max_queries"]).astype(np.int32)
        kv_lens = np.full(items, size["max_keys"], np.int32)
    else:
        query_lens = np.where(draw.random(items) < 1 / 3, 1, draw.integers(1, size["max_queries"], items, endpoint=True)).astype(np.int32)
        kv_lens = draw.integers(query_lens, size["max_keys"], endpoint=True).astype(np.int32)
    width = -(-size["max_keys"] // PAGE)
    page_table = draw.permutation(items * width).reshape(items, width).astype(np.int32)
    generator = torch.Generator(case.device).manual_seed(seed)
    pool = size["num_kv_heads"], items * width, PAGE, size["head_dim"]
    shapes = (int(query_lens.sum()), size["num_heads"], size["head_dim"]), pool, pool
    q, k_pool, v_pool = (torch.randn(shape, generator=generator, device=case.device).to(case.dtype) for shape in shapes)
    k_pool, v_pool = k_pool.transpose(0, 1), v_pool.transpose(0, 1)
    return query_lens, kv_lens, page_table, q, k_pool, v_pool


def results(op: PagedAttention, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    query_lens, kv_lens, page_table, q, k_pool, v_pool = inputs
    return (op.run(q, k_pool, v_pool, op.plan(query_lens, kv_lens, page_table)),)


def timed(op: PagedAttention, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats; what is planned once a step is planned before."""
    query_lens, kv_lens, page_table, q, k_pool, v_pool = inputs
    plan = op.plan(query_lens, kv_lens, page_table)
    return lambda: op.run(q, k_pool, v_pool, plan)


def work(inputs: tuple) -> Work:
    """Keys and values of every item once; products of queries with the keys that they see, and with values (no windows)."""
    query_lens, kv_lens, _, q, k_pool, _ = inputs
    keys, queries = kv_lens.astype(np.int64), query_lens.astype(np.int64)
    seen = int((queries * keys - queries * (queries - 1) // 2).sum())
    num_heads, head_dim = q.shape[1:]
    key_bytes = k_pool.shape[1] * head_dim * k_pool.itemsize
    return Work(2 * q.nbytes + 2 * int(keys.sum()) * key_bytes, flops=4 * seen * num_heads * head_dim)
