"""gated_delta against transformers, row by row and by chunks; rows may come in any number of calls, states carry the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiny import torch_alone
from trireme_kernels.case import Case
from trireme_kernels.choose import build
from trireme_kernels.gated_delta.cases import inputs

with torch_alone():
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

NAMES = ["chunked", "reference"]
SIZES = {"num_key_heads": 2, "num_value_heads": 6, "key_dim": 24, "value_dim": 40}


def made(name):
    return build("gated_delta", name, Case("cpu", torch.float32, SIZES))


def drawn(items, rows, seed=0):
    """(q, k, v, g, beta, initial) of items of exactly so many rows."""
    return inputs(Case("cpu", torch.float32, {**SIZES, "items": items, "max_rows": rows, "full": 1}), seed)[1:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", [torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 150])
def test_is_transformers(name, rule, num_rows):
    q, k, v, g, beta, initial = drawn(1, num_rows)
    group = v.shape[1] // q.shape[1]  # of value heads to a key head: transformers 5.17 repeats key heads before these, not in them
    expected, expected_final = rule(
        *(x[None] for x in (q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v)),
        g=g[None],
        beta=beta[None],
        initial_state=initial,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    op = made(name)
    found, final = op.run(q, k, v, g, beta, initial, op.plan(np.array([num_rows], np.int32)))
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(final, expected_final, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_into_calls(name, seed):
    """Items that differ in length, with calls that have nothing of some of them, or of all."""
    whole = (7, 1, 200, 66)
    q, k, v, g, beta, initial = drawn(1, sum(whole), seed)
    initial = torch.randn(len(whole), *initial.shape[1:], generator=torch.Generator().manual_seed(seed))
    once = made("reference")
    expected, expected_final = once.run(q, k, v, g, beta, initial, once.plan(np.array(whole, np.int32)))

    op, cuts, state = made(name), np.random.default_rng(seed), initial
    ends = np.cumsum(whole)
    done, found = ends - whole, torch.empty_like(expected)
    while (done < ends).any():
        counts = np.minimum(cuts.choice([0, 1, 5, 64, 129], len(whole)), ends - done)
        rows = torch.from_numpy(np.concatenate([np.arange(begin, begin + count) for begin, count in zip(done, counts, strict=True)]))
        before = state.clone()
        found[rows], state = op.run(*(x[rows] for x in (q, k, v, g, beta)), initial=before, plan=op.plan(counts.astype(np.int32)))
        assert torch.equal(state[counts == 0], before[counts == 0])
        done = done + counts
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, expected_final, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_new(name):
    """The states that come in are left alone, also where there is nothing to do."""
    q, k, v, g, beta, initial = drawn(2, 5)
    op, before = made(name), initial.clone()
    for count in (5, 0):
        rows = (x[: 2 * count] for x in (q, k, v, g, beta))
        _, final = op.run(*rows, initial=initial, plan=op.plan(np.full(2, count, np.int32)))
        assert torch.equal(initial, before)
        assert final.data_ptr() != initial.data_ptr()
