"""causal_conv against transformers; an item may be cut at any row, and knows nothing of its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn

from trireme_kernels.case import Case
from trireme_kernels.choose import build, misfit

CHANNELS, KERNEL = 40, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case(DEVICE, torch.float32, {"channels": CHANNELS})


@pytest.mark.parametrize("name", ["tl", "reference"])
def test_cut_items_are_transformers(name):
    """Three items of 1, 21 and 10 rows, each in several calls; two of them begin with rows and inputs of their own."""
    if reason := misfit("causal_conv", name, CASE, forced=True):
        pytest.skip(reason)
    op, draw, cuts = build("causal_conv", name, CASE), torch.Generator().manual_seed(0), np.random.default_rng(0)
    weight = torch.randn(CHANNELS, KERNEL, generator=draw)
    whole = [torch.randn(KERNEL - 1 + rows, CHANNELS, generator=draw) for rows in (1, 21, 10)]
    whole[1][: KERNEL - 1] = 0
    done, found = [KERNEL - 1] * 3, [[], [], []]
    while any(end < len(rows) for end, rows in zip(done, whole, strict=True)):
        counts = np.array([cuts.integers(0, min(9, len(rows) - end), endpoint=True) for end, rows in zip(done, whole, strict=True)])
        x = torch.cat([rows[end : end + count] for rows, end, count in zip(whole, done, counts, strict=True)])
        left = torch.stack([rows[end - KERNEL + 1 : end] for rows, end in zip(whole, done, strict=True)])
        out = op.run(x.to(DEVICE), left.to(DEVICE), weight.to(DEVICE), op.plan(counts.astype(np.int32))).cpu()
        for item, part in enumerate(out.split(counts.tolist())):
            found[item].append(part)
            done[item] += len(part)
    for rows, parts in zip(whole, found, strict=True):
        expected = causal_conv1d_fn(rows.t()[None], weight, activation="silu")[0].t()[KERNEL - 1 :]
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-5)
