"""Decode inside a CUDA graph: one captured object, planned anew for every replay, gives what plain plans give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trireme_kernels.case import Case
from trireme_kernels.choose import build, implementations, misfit
from trireme_kernels.paged_attention.op import PAGE

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
BATCH, MAX_PAGES = 6, 20


def made(name, window=0):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    case = Case(DEVICE, dtype, {**SIZES, "window": window})
    reason = misfit("paged_attention", name, case, forced=True)
    if reason is not None:
        pytest.skip(reason)
    return build("paged_attention", name, case), build("paged_attention", "reference", case), dtype


def storage(dtype):
    """(q, k_pool, v_pool) for BATCH items of MAX_PAGES pages."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (BATCH, 8, 128), *[(BATCH * MAX_PAGES, 2, PAGE, 128)] * 2
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]


def steps():
    """(kv_lens, page_table) of steps of various batches and lengths."""
    draw = np.random.default_rng(1)
    for num_items, longest in ((6, 40), (6, 320), (1, 1), (3, 320), (0, 1), (6, 17)):
        kv_lens = draw.integers(1, longest, num_items, endpoint=True).astype(np.int32)
        width = -(-int(kv_lens.max(initial=0)) // PAGE)
        yield kv_lens, draw.permutation(BATCH * MAX_PAGES)[: num_items * width].reshape(num_items, width).astype(np.int32)


def expected(reference, q, k_pool, v_pool, kv_lens, page_table):
    return reference.run(q[: len(kv_lens)], k_pool, v_pool, reference.plan(np.ones_like(kv_lens), kv_lens, page_table))


@pytest.mark.parametrize("name", implementations("paged_attention")[:-1])
def test_planned_in_place(name):
    op, reference, dtype = made(name)
    pools = storage(dtype)
    captured = op.captured(BATCH, MAX_PAGES)
    for step in steps():
        captured.plan(*step)
        found = captured.run(*pools)
        assert len(found) == BATCH
        torch.testing.assert_close(found[: len(step[0])], expected(reference, *pools, *step), atol=2e-2, rtol=2e-2)


def test_the_reference_cannot():
    assert made("reference")[1].captured(BATCH, MAX_PAGES) is None


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: there are no CUDA graphs without one")
@pytest.mark.parametrize("name", implementations("paged_attention")[:-1])
@pytest.mark.parametrize("window", [0, 50])
def test_replays(name, window):
    """All steps are planned and replayed without waiting for any: each replay reads its own plan."""
    op, reference, dtype = made(name, window)
    pools = storage(dtype)
    captured = op.captured(BATCH, MAX_PAGES)
    captured.plan(*next(steps()))
    captured.run(*pools)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.run(*pools)
    busy = torch.randn(4096, 4096, device=DEVICE)
    found = []
    for step in list(steps()) * 3:
        for _ in range(20):
            busy = busy @ busy * 1e-3  # the device falls behind the plans
        captured.plan(*step)
        graph.replay()
        found.append(out.clone())
    for step, rows in zip(list(steps()) * 3, found, strict=True):
        torch.testing.assert_close(rows[: len(step[0])], expected(reference, *pools, *step), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: FlashInfer has no CPU form")
def test_plans_stay_as_they_were_made():
    """Plans made ahead of their runs, while the device is behind; dropped ones are used anew."""
    op, reference, dtype = made("flashinfer")
    q, k_pool, v_pool = storage(dtype)
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(3):
        for _ in range(20):
            busy = busy @ busy * 1e-3
        taken = [step for step in steps() if len(step[0])]
        plans = [op.plan(np.ones_like(kv_lens), kv_lens, page_table) for kv_lens, page_table in taken]
        found = [op.run(q[: len(step[0])], k_pool, v_pool, plan) for step, plan in zip(taken, plans, strict=True)]
        for step, rows in zip(taken, found, strict=True):
            torch.testing.assert_close(rows, expected(reference, q, k_pool, v_pool, *step), atol=2e-2, rtol=2e-2)
