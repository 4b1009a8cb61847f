"""paged_attention's reference against plain SDPA, item by item, on keys and values that were never paged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme_kernels.choose import Choices
from trireme_kernels.paged_attention.groups import QUERY_BLOCK, Cost, cut_queries, group

PAGE = 16
HEADS = {"gqa": (9, 3, 64), "mha": (4, 4, 32), "mqa": (5, 1, 48)}


def storage(k, v, kv_lens, layout, draw):
    """Unpaged keys and values (a list of [S, Hk, D]) -> pools with garbage where nothing is, and a page table."""
    needs = [-(-int(length) // PAGE) for length in kv_lens]
    heads, dim = k[0].shape[1:]
    free = torch.randperm(sum(needs) + 3, generator=draw).tolist()
    table = np.full((len(needs), max(needs) + 2), -1, np.int32)
    total = len(free)
    shape, order = {"outer": ((heads, total, PAGE, dim), (1, 0, 2, 3)), "inner": ((total, PAGE, heads, dim), (0, 2, 1, 3))}[layout]
    pools = [torch.randn(shape, generator=draw).to(k[0].dtype).permute(order) for _ in "kv"]
    for item, need in enumerate(needs):
        table[item, :need] = [free.pop() for _ in range(need)]
        for pool, values in zip(pools, (k[item], v[item]), strict=True):
            for nth, page in enumerate(table[item, :need]):
                part = values[nth * PAGE : (nth + 1) * PAGE]
                pool[page, :, : len(part)] = part.transpose(0, 1)
    return *pools, table


def check(query_lens, kv_lens, *, heads="gqa", window=0, dtype=torch.float32, layout="outer", seed=0):
    num_heads, num_kv_heads, dim = HEADS[heads]
    draw = torch.Generator().manual_seed(seed)
    k, v = ([torch.randn(int(length), num_kv_heads, dim, generator=draw).to(dtype) for length in kv_lens] for _ in "kv")
    q = torch.randn(int(sum(query_lens)), num_heads, dim, generator=draw).to(dtype)
    expected = []
    for part, keys, values in zip(q.split([int(count) for count in query_lens]), k, v, strict=True):
        place = torch.arange(len(keys) - len(part), len(keys))[:, None]
        key = torch.arange(len(keys))[None]
        seen = (key <= place) & ((place - key < window) if window else True)
        out = F.scaled_dot_product_attention(
            part.float().transpose(0, 1),
            *(x.float().transpose(0, 1).repeat_interleave(num_heads // num_kv_heads, 0) for x in (keys, values)),
            attn_mask=seen,
        )
        expected.append(out.transpose(0, 1))
    k_pool, v_pool, table = storage(k, v, kv_lens, layout, draw)
    op = Choices("cpu", dtype)("paged_attention", num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim, window=window)
    plan = op.plan(np.array(query_lens, np.int32), np.array(kv_lens, np.int32), torch.from_numpy(table) if seed % 2 else table)
    found = op.run(q, k_pool, v_pool, plan)
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [
        ([1], [1]),
        ([1], [16]),
        ([1, 1, 1, 1, 1], [1, 17, 300, 301, 40]),
        ([50], [50]),
        ([200], [200]),
        ([130], [333]),
        ([1, 70, 1, 1, 3, 20], [90, 70, 5, 400, 35, 21]),
    ],
    ids=["first", "full page", "decode", "prompt", "long prompt", "chunk", "mixed"],
)
def test_is_plain_attention(query_lens, kv_lens, heads, window):
    check(query_lens, kv_lens, heads=heads, window=window)


@pytest.mark.parametrize("layout", ["outer", "inner"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 33])
def test_types_and_layouts(dtype, layout, window):
    check([1, 70, 1, 1, 3, 20], [90, 70, 5, 400, 35, 21], dtype=dtype, layout=layout, window=window)


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 150)), st.integers(0, 260)), min_size=1, max_size=12),
    heads=st.sampled_from(sorted(HEADS)),
    window=st.sampled_from([0, 0, 1, 16, 100]),
    seed=st.integers(0, 99),
)
def test_any_lengths(items, heads, window, seed):
    queries = [count for count, _ in items]
    check(queries, [count + prefix for count, prefix in items], heads=heads, window=window, seed=seed)


def test_neighbouring_pages_are_not_gathered():
    op = Choices("cpu", torch.float32)("paged_attention", num_heads=2, num_kv_heads=1, head_dim=8)
    one, length = np.ones(1, np.int32), np.array([50], np.int32)
    assert op.plan(one, length, np.array([[3, 4, 5, 6]], np.int32)).groups[0].pages == slice(3, 7)
    assert op.plan(one, length, np.array([[3, 4, 6, 5]], np.int32)).groups[0].pages.tolist() == [3, 4, 6, 5]


def test_no_rows():
    op = Choices("cpu", torch.float32)("paged_attention", num_heads=2, num_kv_heads=1, head_dim=8)
    none, pool = np.empty(0, np.int32), torch.zeros(2, 1, PAGE, 8)
    assert op.run(torch.empty(0, 2, 8), pool, pool, op.plan(none, none, np.empty((0, 4), np.int32))).shape == (0, 2, 8)


def test_queries_are_cut_with_the_keys_they_need():
    item, row, count, end = cut_queries(np.array([3, 0, 5]), np.array([10, 4, 5]), 2)
    assert item.tolist() == [0, 0, 2, 2, 2]
    assert row.tolist() == [0, 2, 3, 5, 7]
    assert count.tolist() == [2, 1, 2, 2, 1]
    assert end.tolist() == [9, 10, 2, 4, 5]


def test_groups_pad_little_and_stay_small():
    """64 decodes and a chunk: every query once, padding under a fifth, no group over the cache budget unless alone."""
    draw = np.random.default_rng(0)
    query_lens = np.array([448, *[1] * 64], np.int32)
    kv_lens = np.array([900, *draw.integers(64, 2048, 64)], np.int32)
    cost = Cost(key_bytes=1536, score_bytes=36)
    groups = group(query_lens, kv_lens, np.arange(65 * 128, dtype=np.int32).reshape(65, 128), 0, cost)
    assert set(np.concatenate([g.rows.ravel() for g in groups]).tolist()) == set(range(512))
    assert sum(g.rows.size for g in groups) == 512, "448 is a whole number of blocks: no query is padded"
    decodes = [g for g in groups if g.rows.shape[1] == 1]
    assert sum(len(g.rows) * g.num_keys for g in decodes) < 1.2 * kv_lens[1:].sum()
    assert all(g.rows.shape[1] <= QUERY_BLOCK for g in groups)
    for g in groups:
        assert len(g.rows) == 1 or len(g.rows) * g.num_keys * (1536 + 36 * g.rows.shape[1]) < 1.3 * (4 << 20)
