"""Groups and pairs on two GPUs: NCCL gives what gloo gives, can be captured, and an epoch's end frees a rank whose peer is gone."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from spawned import LIMIT_S, on_gpus
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import Pair, form_group
from trireme.parallel.context import Context, Shared
from trireme.parallel.mesh import Mesh
from trireme.parallel.placement import Placement
from trireme.parallel.plan import Plan
from trireme.parallel.relocation import Mixture, Relocation

pytestmark = [pytest.mark.gpus, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def rows_of(place: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(num_rows * 4).view(num_rows, 4) % 7 + place).to(dtype)


def collectives(place: int, store: Any, epoch: int, device: torch.device) -> list[list]:
    groups = [
        form_group(store, epoch, f"on {kind}", place, 2, LIMIT_S, on)
        for kind, on in (("cpu", torch.device("cpu")), ("cuda", device))
    ]  # fmt: skip
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for group, where in zip(groups, ("cpu", device), strict=True):
            sent, received = ([1, 2], [1, 4]) if place == 0 else ([4, 3], [2, 3])
            found += [
                group.all_reduce(rows_of(place, 5, dtype).to(where)).tolist(),
                group.all_gather(rows_of(place, 3 + place, dtype).to(where), [3, 4]).tolist(),
                group.reduce_scatter(rows_of(place, 5, dtype).to(where), [2, 3]).tolist(),
                group.all_to_all(rows_of(place, sum(sent), dtype).to(where), sent, received).tolist(),
            ]
    for group in groups:
        group.close()
    return found


def test_nccl_gives_what_gloo_gives():
    for found in on_gpus(2, collectives, 1).values():
        for start in (0, 8):  # small whole numbers: exact in both types
            assert found[start + 4 : start + 8] == found[start : start + 4]


def captured(place: int, store: Any, epoch: int, device: torch.device) -> list[float]:
    group = form_group(store, epoch, "captured", place, 2, LIMIT_S, device)
    x, out = torch.zeros(8, 4, device=device), torch.zeros(8, 4, device=device)
    group.all_reduce(x.clone())  # once outside, as capture asks
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out.copy_(group.all_reduce(x + 1))
    found = []
    for value in (1.0, 5.0):
        x.fill_(value * (place + 1))
        graph.replay()
        found.append(out.mean().item())
    del graph
    group.close()
    return found


def test_a_collective_is_captured_and_replayed():
    assert list(on_gpus(2, captured, 2).values()) == [[5.0, 17.0], [5.0, 17.0]]


def twins(place: int, store: Any, epoch: int, device: torch.device) -> float:
    pair = Pair(store, epoch, "edge", place, LIMIT_S, 3, device)
    worst = 0.0
    for number in range(20):
        if place == 0:
            pair.send(torch.full((number + 1, 64), float(number), device=device))
        else:
            worst = max(worst, (pair.expect(number + 1, 64, dtype=torch.float32).wait() - number).abs().max().item())
    torch.cuda.synchronize()
    pair.close()
    return worst


def test_rows_pass_from_twin_to_twin():
    assert on_gpus(2, twins, 3)[1] == 0.0


def bereft(place: int, store: Any, epoch: int, device: torch.device) -> tuple[float, float]:
    """(seconds until the end of the epoch freed this rank, a sum computed after it)."""
    group = form_group(store, epoch, "broken", place, 2, LIMIT_S, device)
    x = group.all_reduce(torch.ones(4, device=device))
    torch.cuda.synchronize()
    if place == 1:
        os._exit(1)
    time.sleep(0.5)
    threading.Timer(1.0, group.close).start()
    began = time.monotonic()
    group.all_reduce(x)
    torch.cuda.synchronize()  # nobody answers
    return time.monotonic() - began, torch.ones(8, device=device).sum().item()


def test_the_end_of_an_epoch_frees_a_rank_whose_peer_is_gone():
    waited, after = on_gpus(2, bereft, 4, wait_for=(0,))[0]
    assert waited < 10 and after == 8.0


def beside(place: int, store: Any, epoch: int, device: torch.device) -> int:
    """Wrong numbers in a pool that is filled beside products, in all of many layers."""
    collectives = Collectives(Mesh(Plan(layer_cut=(1,), cp=2)), place, device)
    context, wrong = Context(collectives), torch.zeros((), dtype=torch.int64, device=device)
    collectives.begin({span: form_group(store, epoch, "cp", place, 2, LIMIT_S, device) for span in collectives.spans})
    weight = torch.eye(2048, device=device, dtype=torch.bfloat16)
    pool = torch.zeros(2 * 8192, 2048, device=device, dtype=torch.bfloat16)
    for layer in range(60):
        num_rows = 8192 - layer // 20  # also what is padded
        counts, pages = [num_rows, 8192], torch.randperm(num_rows + 8192, device=device)
        shared = Shared(counts, pages, pages)
        mine = torch.full((counts[place], 2048), float(layer % 50 + 100 * place), device=device, dtype=torch.bfloat16) @ weight
        with context.aside() as written:
            pool.index_copy_(0, shared.pages, context.all_gather(mine, shared))
        for _ in range(3):
            torch.mm(torch.full_like(mine, -1), weight)  # memory that would be `mine`, were it given away
        written.wait()
        came = torch.tensor([layer % 50, layer % 50 + 100.0], device=device).repeat_interleave(torch.tensor(counts, device=device))
        wrong += (pool.index_select(0, pages) != came[:, None]).sum()
    found = int(wrong)
    collectives.leave()
    return found


def test_keys_and_values_come_beside_products():
    assert list(on_gpus(2, beside, 6).values()) == [0, 0]


def relocated(place: int, store: Any, epoch: int, device: torch.device) -> tuple[bool, int, float]:
    """Steps of one communicator go on while experts move by another: (whether every slot holds its expert after each of many maps,
    steps meanwhile, the longest commit in milliseconds)."""
    collectives = Collectives(Mesh(Plan(layer_cut=(1,), tp=2, ep=2)), place, device)
    num_experts, width, mixtures = 64, 1 << 20, []
    for _ in range(4):
        placement = Placement(num_experts, 2, place, num_redundant=16, device=device)
        weight = torch.tensor(placement.here, device=device)[:, None].expand(-1, width).to(torch.bfloat16).contiguous()
        mixtures.append(Mixture(placement, [weight]))
    steps, relocation = collectives.along("tp"), Relocation(collectives.along("ep", use="eplb"), mixtures, most_layers=4)
    collectives.begin(
        {
            span: form_group(store, epoch, collectives.mesh.name_of(span), place, 2, LIMIT_S, torch.device("cpu") if span.use else device)
            for span in collectives.spans
        }
    )
    print(f"rank {place}: {relocation.warm_up(LIMIT_S, lambda: False)}")
    sys.setswitchinterval(0.0002)  # as ranks do
    x, draw = torch.ones(256, 2048, device=device), np.random.default_rng(0)
    holds, num_steps, longest = True, 0, 0.0
    for version in range(1, 4):
        spare = draw.integers(num_experts, size=(4, 16))
        maps = {layer: draw.permutation(np.concatenate([np.arange(num_experts), spare[layer]])).astype(np.int32) for layer in range(4)}
        thread = threading.Thread(target=relocation.prepare, args=(version, maps))
        thread.start()
        for _ in range(100):  # as many on both, as steps of a plan are
            x = steps.all_reduce(x @ x.T @ x).clamp_(-1, 1)
            num_steps += 1
        thread.join()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        relocation.commit(version)
        end.record()
        torch.cuda.synchronize()
        longest = max(longest, begin.elapsed_time(end))
        steps.all_reduce(x)  # neither goes on before both have committed
        torch.cuda.synchronize()
        for placement, (weight,) in mixtures:
            here = torch.tensor(placement.here, device=device)[:, None].to(weight.dtype)
            holds &= bool((weight == here).all()) and relocation.version == version
    collectives.leave()
    return holds, num_steps, longest


def test_experts_move_while_steps_go_on():
    for holds, num_steps, _ in on_gpus(2, relocated, 5).values():
        assert holds and num_steps == 300
