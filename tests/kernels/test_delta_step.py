"""delta_step: any run of steps that hold rows, replay some and take others is one pass over the rows that stand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from trireme_kernels.case import Case
from trireme_kernels.causal_conv.reference import convolve
from trireme_kernels.choose import build, implementations, misfit
from trireme_kernels.gated_delta.gates import gates
from trireme_kernels.gated_delta.reference import recur
from trireme_kernels.gated_rms_norm.reference import gated_rms_norm

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM, KERNEL = 1, 2, 12, 20, 4
KEYS, VALUES = KEY_HEADS * KEY_DIM, HEADS * VALUE_DIM
CHANNELS = 2 * KEYS + VALUES
WIDTHS = CHANNELS, HEADS, HEADS, VALUES  # of a row: qkv, a, b, gate
KEPT, WIDE, EPS = CHANNELS + 2 * HEADS, sum(WIDTHS), 1e-6
SLOTS, ROOM, STATES = 6, 4, 9  # slots, then snapshots
CASE = Case(
    DEVICE,
    torch.float32,
    {"num_key_heads": KEY_HEADS, "num_value_heads": HEADS, "key_dim": KEY_DIM, "value_dim": VALUE_DIM, "kernel": KERNEL},
)


def made(name):
    if reason := misfit("delta_step", name, CASE, forced=True):
        pytest.skip(reason)
    return build("delta_step", name, CASE)


class Layer:
    """A layer's weights and its pools, which begin with what others left there."""

    def __init__(self, seed):
        self._draw = torch.Generator().manual_seed(seed)
        self.weights = [self.normal(CHANNELS, KERNEL), self.normal(HEADS), self.normal(HEADS), self.normal(VALUE_DIM)]
        pools = (STATES, KERNEL - 1, CHANNELS), (STATES, HEADS, KEY_DIM, VALUE_DIM), (SLOTS, ROOM, KEPT)
        self.pools = [self.normal(*shape).to(DEVICE) for shape in pools]

    def normal(self, *shape):
        return torch.randn(shape, generator=self._draw)

    def run(self, op, rows, slots, fresh, *plan):
        """rows [N, C + 2 Hv + Hv Dv] -> [N, Hv, Dv]."""
        slots, fresh = torch.tensor(slots).to(DEVICE), torch.tensor(fresh).to(DEVICE)
        return op.run(*parts(rows.to(DEVICE)), *(weight.to(DEVICE) for weight in self.weights), EPS, *self.pools, slots, fresh, *plan).cpu()

    def expected(self, rows):
        """Outputs [N, Hv, Dv], inputs and state of a sequence from its begin on."""
        weight, log_decay, dt_bias, norm = self.weights
        line = torch.cat((torch.zeros(KERNEL - 1, CHANNELS), rows[:, :CHANNELS]))
        q, k, v = convolve(line[None], weight).split((KEYS, KEYS, VALUES), dim=-1)
        _, a, b, gate = parts(rows)
        g, beta = gates(a, b, log_decay, dt_bias)
        state = torch.zeros(1, HEADS, KEY_DIM, VALUE_DIM)
        heads = (q.unflatten(-1, (-1, KEY_DIM)), k.unflatten(-1, (-1, KEY_DIM)), v.unflatten(-1, (-1, VALUE_DIM)))
        read = recur(*heads, g[None], beta[None], state)[0]
        return gated_rms_norm(read, gate, norm, EPS), line[len(rows) :], state[0]


def parts(rows):
    """qkv [N, C], a, b [N, Hv], gate [N, Hv, Dv]."""
    *others, gate = rows.split(WIDTHS, dim=1)
    return *others, gate.unflatten(1, (HEADS, VALUE_DIM))


class Request(NamedTuple):
    slot: int
    stand: torch.Tensor  # rows that its state has or will replay, from the begin on
    replays: int = 0


@pytest.mark.parametrize(("name", "seed", "num_steps"), [("tl", 0, 4), *(("reference", seed, 7) for seed in range(5))])
def test_steps_are_one_pass(name, seed, num_steps):
    op, layer, draw = made(name), Layer(seed), np.random.default_rng(seed)
    requests = [Request(slot, torch.empty(0, WIDE)) for slot in draw.permutation(SLOTS)[:4].tolist()]
    others = [slot for slot in range(STATES) if slot not in {request.slot for request in requests}]
    before = [pool.clone() for pool in layer.pools]
    for _ in range(num_steps):
        chosen = draw.permutation(len(requests))[: draw.integers(1, len(requests), endpoint=True)]
        here = [requests[which] for which in chosen]
        counts = draw.integers(1, ROOM, len(here), endpoint=True)
        fresh = np.array([not len(request.stand) for request in here])
        replays, holds = np.array([request.replays for request in here]), (draw.random(len(here)) < 0.6) & ~fresh
        rows = [layer.normal(count, WIDE) for count in counts]
        plan = op.plan(counts.astype(np.int32), replays.astype(np.int32), holds)
        found = layer.run(op, torch.cat(rows), [request.slot for request in here], fresh, plan).split(counts.tolist())
        for which, request, new, hold, out in zip(chosen, here, rows, holds, found, strict=True):
            after = torch.cat((request.stand, new))
            torch.testing.assert_close(out, layer.expected(after)[0][-len(new) :], atol=1e-5, rtol=1e-4)
            _, window, state = layer.expected(request.stand if hold else after)
            torch.testing.assert_close(layer.pools[0][request.slot].cpu(), window)
            torch.testing.assert_close(layer.pools[1][request.slot].cpu(), state, atol=1e-5, rtol=1e-4)
            accepted = int(draw.integers(1, len(new), endpoint=True)) if hold else len(new)
            requests[which] = Request(request.slot, after[: len(request.stand) + accepted], accepted if hold else 0)
    for pool, old in zip(layer.pools, before, strict=True):
        assert torch.equal(pool[[slot for slot in others if slot < len(pool)]], old[[slot for slot in others if slot < len(pool)]])


@pytest.mark.parametrize("name", implementations("delta_step")[:-1])
def test_captured(name):
    """One captured object, planned anew for steps of up to four items of up to three rows; on a GPU, in a graph."""
    op, reference = made(name), made("reference")
    layer, twin, draw, width = Layer(0), Layer(0), np.random.default_rng(0), 3
    captured, num_rows = op.captured(4, width), 4 * width
    rows, slots, fresh = torch.zeros(num_rows, WIDE), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
    rows, slots, fresh = rows.to(DEVICE), slots.to(DEVICE), fresh.to(DEVICE)
    weights = [weight.to(DEVICE) for weight in layer.weights]

    def forward():
        return captured.run(*parts(rows), *weights, EPS, *layer.pools, slots, fresh)

    captured.plan(*[np.empty(0, np.int32)] * 3)
    replay = forward
    if ON_GPU:
        forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()

        def replay():
            graph.replay()
            return out

    for num_items in (4, 1, 3, 0, 2):
        counts, replays = draw.integers(1, width, num_items, endpoint=True), draw.integers(0, ROOM, num_items, endpoint=True)
        numbers = counts.astype(np.int32), replays.astype(np.int32), draw.random(num_items) < 0.5
        used, news = draw.permutation(SLOTS)[:num_items].tolist(), (replays == 0) & (draw.random(num_items) < 0.5)
        step = layer.normal(int(counts.sum()), WIDE)
        places = torch.tensor([item * width + row for item in range(num_items) for row in range(counts[item])], dtype=torch.int64)
        rows[places.to(DEVICE)] = step.to(DEVICE)
        slots[:num_items], fresh[:num_items] = torch.tensor(used, dtype=torch.int64), torch.from_numpy(news)
        captured.plan(*numbers)
        found = replay().cpu()
        assert not np.delete(found.numpy(), places, axis=0).any()
        found = found[places]
        if num_items:
            expected = twin.run(reference, step, used, news, reference.plan(*numbers))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        for pool, other in zip(layer.pools, twin.pools, strict=True):
            torch.testing.assert_close(pool, other, atol=1e-5, rtol=1e-4)


def test_the_reference_cannot_be_captured():
    assert made("reference").captured(4, 1) is None
