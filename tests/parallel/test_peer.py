"""Sums through memory that ranks share, on two and four GPUs: the same bits on all ranks however they are skewed, in graphs too; NCCL
above a size; and a rank whose peer was killed is freed."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from spawned import LIMIT_S, on_gpus
from trireme.core.step import Regime
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import exchange, form_group
from trireme.parallel.deal import Deal
from trireme.parallel.layout import SUM, home_of, lay
from trireme.parallel.mesh import Mesh
from trireme.parallel.peer import Peers, find_most, meet_peers
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Seam
from trireme_kernels.choose import Choices

pytestmark = [pytest.mark.gpus, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

HOW_MANY = [2, pytest.param(4, marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"))]


def meet(place: int, size: int, store: Any, epoch: int, device: torch.device, hidden: int, dtype: torch.dtype) -> Peers:
    op = Choices("cuda", dtype)("peer_sum", hidden=hidden)

    def tell(about: str, said: bytes) -> list[bytes]:
        return exchange(store, epoch, f"{hidden} {dtype} {about}", place, size, said)

    words = torch.cuda.Stream(device, priority=-1)
    peers = meet_peers(place, size, device, hidden=hidden, dtype=dtype, op=op, words=words, exchange=tell)
    assert isinstance(peers, Peers), peers
    return peers


def skewed(place: int, store: Any, epoch: int, device: torch.device, size: int) -> list[tuple[bool, bool, float]]:
    """For each form: (whether every sum is that of the parts in order, whether plain ones are too, how far NCCL's are)."""
    found = []
    group, late = form_group(store, epoch, "sums", place, size, LIMIT_S, device), random.Random(place)
    for hidden in (2048, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            peers, choices = meet(place, size, store, epoch, device, hidden, dtype), Choices("cuda", dtype)
            add_rms_norm = choices("add_rms_norm", hidden=hidden)
            draw = torch.Generator(device).manual_seed(1)  # alike on all GPUs
            weight = torch.randn(hidden, generator=draw, device=device).to(dtype)
            exact, plain, far = True, True, 0.0
            for num_rows in [*range(1, 65), 256, *[1] * 50, 64, 3]:
                parts, residual = (
                    torch.randn(*shape, num_rows, hidden, generator=draw, device=device).to(dtype) for shape in ((size,), ())
                )
                summed = torch.zeros(num_rows, hidden, device=device)
                for part in parts:
                    summed += part.float()
                torch.cuda._sleep(late.choice((0, 0, 1000, 100_000)))
                normed, total = peers.sum_norm(parts[place], residual, weight, 1e-6)
                torch.cuda._sleep(late.choice((0, 0, 1000, 100_000)))
                alone = peers.sum(parts[place].clone())
                expected = (summed + residual.float()).to(dtype)
                exact &= torch.equal(total, expected)
                torch.testing.assert_close(normed, add_rms_norm(expected, torch.zeros_like(expected), weight, 1e-6)[0])
                plain &= torch.equal(alone, summed.to(dtype))
                highest, best = peers.best(parts[place, :, 0].float(), torch.arange(num_rows, device=device) * size + place)
                plain &= torch.equal(highest, parts[:, :, 0].float().amax(0))
                plain &= torch.equal(best % size, parts[:, :, 0].float().argmax(0))
                far = max(far, (group.all_reduce(parts[place].clone()).float() - alone.float()).abs().max().item())
            found.append((exact, plain, far))
            torch.cuda.synchronize()
            exchange(store, epoch, f"{hidden} {dtype} done", place, size, b"")
    return found


@pytest.mark.parametrize("size", HOW_MANY)
def test_sums_are_those_of_the_parts_in_order_and_near_nccls(size):
    for found in on_gpus(size, skewed, 1, size).values():
        for (exact, plain, far), limit in zip(found, (1e-5, 0.13) * 2, strict=True):
            assert exact and plain and far < limit


def captured(place: int, store: Any, epoch: int, device: torch.device, size: int) -> list[float]:
    """How far any of 72 sums of a graph, replayed a thousand times with other numbers each, is from what it must be."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        peers, hidden = meet(place, size, store, epoch, device, 4096, dtype), 4096
        weight, column = torch.ones(hidden, device=device, dtype=dtype), torch.arange(hidden, device=device)
        turn, worst = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)

        def steps(peers=peers, dtype=dtype, hidden=hidden, weight=weight, column=column, turn=turn, worst=worst) -> None:
            turn.add_(1)
            for number in range(72):
                num_rows = (1, 1, 7, 64)[number % 4]
                wave = ((column + turn + number) % 13)[None].expand(num_rows, hidden)
                residual = torch.full_like(wave, number % 5, dtype=dtype)
                expected = size * wave + sum(range(size))
                if number % 9 == 8:
                    off = peers.sum((wave + place).to(dtype)) - expected
                else:
                    off = peers.sum_norm((wave + place).to(dtype), residual, weight, 1e-6)[1] - residual - expected
                torch.maximum(worst, off.abs().max().float()[None], out=worst)

        steps()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            steps()
        late = random.Random(place)
        for number in range(1000):
            graph.replay()
            if number % 50 == 0:
                time.sleep(late.random() * 0.01)
        torch.cuda.synchronize()
        found.append(worst.item())
        exchange(store, epoch, f"{dtype} done", place, size, b"")
    return found


@pytest.mark.parametrize("size", HOW_MANY)
def test_a_graph_of_sums_is_replayed_a_thousand_times(size):
    assert list(on_gpus(size, captured, 2, size).values()) == [[0.0, 0.0]] * size  # small whole numbers: exact in both types


def seamed(place: int, store: Any, epoch: int, device: torch.device) -> tuple[float, int, int]:
    """(how far a seam's results are from those by NCCL, numbers of the largest sum, of one too large)."""
    dtype, hidden, plan = torch.bfloat16, 4096, Plan(layer_cut=(1,), tp=2)
    choices = Choices("cuda", dtype)
    collectives = Collectives(Mesh(plan), place, device, choices("peer_sum", hidden=hidden))
    home = home_of(Regime())
    seam = Seam(
        lay(tp=SUM).at(home),
        home,
        lay().at(home),
        collectives,
        weight=torch.ones(hidden, device=device, dtype=dtype),
        eps=1e-6,
        rms_norm=choices("rms_norm", hidden=hidden),
        add_rms_norm=choices("add_rms_norm", hidden=hidden),
    )
    [span] = collectives.spans
    group, peers = form_group(store, epoch, "seam", place, 2, LIMIT_S, device), meet(place, 2, store, epoch, device, hidden, dtype)
    found = find_most(peers, group, device, lambda name, said: exchange(store, epoch, name, place, 2, said), LIMIT_S, lambda: False)
    print(f"rank {place}: {found}", flush=True)
    most, worst = peers.most, 0.0
    draw = torch.Generator(device).manual_seed(place)
    for num_rows in (1, 8, 300):
        x, residual = (torch.randn(num_rows, hidden, generator=draw, device=device).to(dtype) for _ in range(2))
        deal = Deal(plan, place, np.array([num_rows]), Regime(), device)
        results = []
        for peers_of in ({span: peers}, {}):
            collectives.begin({span: group}, peers_of)
            normed, [summed] = seam([x.clone()], [residual], deal)
            results.append((normed.whole(), summed))
        worst = max(worst, *((one - other).abs().max().item() for one, other in zip(*results, strict=True)))
    too_large = torch.empty(most + 1, dtype=dtype, device=device)
    collectives.begin({span: group}, {span: peers})
    collectives.leave()
    return worst, most, int(peers.takes(too_large))


def test_a_seam_gives_what_it_gives_by_nccl():
    found = list(on_gpus(2, seamed, 3).values())
    assert all(worst < 0.13 and not too_large for worst, _, too_large in found)
    assert found[0][1] == found[1][1] > 0, "peers are never faster here"


def bereft(place: int, store: Any, epoch: int, device: torch.device) -> tuple[float, float]:
    """(seconds until the end of the epoch freed this rank, a sum computed after it)."""
    dtype, hidden = torch.bfloat16, 4096
    collectives = Collectives(Mesh(Plan(layer_cut=(1,), tp=2)), place, device)
    along = collectives.along("tp")
    [span] = collectives.spans
    group = form_group(store, epoch, "broken", place, 2, LIMIT_S, device)
    collectives.begin({span: group}, {span: meet(place, 2, store, epoch, device, hidden, dtype)})
    x = along.all_reduce(torch.ones(4, hidden, dtype=dtype, device=device))
    torch.cuda.synchronize()
    exchange(store, epoch, "first sum", place, 2, b"")
    if place == 1:
        os._exit(1)
    time.sleep(0.5)
    threading.Timer(1.0, collectives.leave).start()
    began = time.monotonic()
    for _ in range(8):
        along.all_reduce(x)
    torch.cuda.synchronize()  # nobody answers
    waited = time.monotonic() - began
    time.sleep(0.5)
    return waited, torch.ones(8, device=device).sum().item()


def test_the_end_of_an_epoch_frees_a_rank_whose_peer_was_killed():
    waited, after = on_gpus(2, bereft, 4, wait_for=(0,))[0]
    assert 0.5 < waited < 10 and after == 8.0
