"""Moe blocks of many ranks against the block of one: what ranks owe adds up, and the shared expert is counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layers.test_param import build
from parallel.test_placement import random_map
from threads import Boards, on_every_rank
from tiny import tiny_config
from trireme.core.batch import Batch
from trireme.layers.block import Build
from trireme.layers.linear import Linear
from trireme.layers.moe import Moe, route_evenly
from trireme.layers.param import Param
from trireme.models.spec import Spec, make_spec
from trireme.parallel.deal import Deal
from trireme.parallel.layout import cut_of, home_of
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Route
from trireme.parallel.strips import Strips
from trireme_kernels.choose import Choices

SPEC = make_spec(tiny_config("qwen2_moe").to_dict())
NOTHING = torch.zeros(0, dtype=torch.int64)
BATCH = Batch(NOTHING, NOTHING, NOTHING, attention={}, shared=None, caches=[])  # experts read no more of it


def filled(rank_build: Build, map: np.ndarray | None = None) -> Moe:
    """A rank's block, with its slices of the weights that every plan has."""
    moe = Moe(rank_build, 1)
    if map is not None:
        moe.placement.rewrite(map, 1)
    draw = torch.Generator().manual_seed(0)
    for _, param in sorted(moe.named_parameters()):
        assert isinstance(param, Param)
        whole = 0.3 * torch.randn(param.whole, generator=draw)
        for piece in param.pieces(tuple(range(param.num_parts))):
            param.data[piece.target].copy_(whole[piece.source])
    for module in moe.modules():
        if isinstance(module, Linear):
            module.prepare()
    return moe


def given(moe: Moe, x: torch.Tensor) -> torch.Tensor:
    [rows] = moe(Strips.of(x), BATCH)
    return rows


@pytest.mark.parametrize("width", [0, 36, 35], ids=["no shared expert", "shared", "shared, not divided"])
@pytest.mark.parametrize("experts", ["gathered", "dispatched"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 2},
        {"tp": 2, "ep": 2},
        {"tp": 4, "ep": 2, "sp": True},
        {"cp": 4, "ep": 4},
        {"tp": 2, "cp": 2, "ep": 2, "moe_dp": 2, "sp": True},
        {"tp": 2, "cp": 2, "moe_dp": 2},
    ],
    ids=lambda sizes: str(Plan(layer_cut=(1,), **sizes)),
)
@pytest.mark.parametrize("num_rows", [1, 11])
def test_ranks_together_give_what_one_gives(sizes: dict[str, Any], experts: str, width: int, num_rows: int):
    """In every regime, by way of the moves that seams would make."""
    spec, x = replace(SPEC, shared_intermediate=width), torch.randn(num_rows, SPEC.hidden)
    check_ranks(spec, x, given(filled(build(spec)), x), {**sizes, "experts": experts})


@pytest.mark.parametrize("experts", ["gathered", "dispatched"])
@pytest.mark.parametrize("sizes", [{"tp": 4, "ep": 4}, {"tp": 4, "ep": 2, "sp": True}, {"tp": 2, "cp": 2, "ep": 2, "moe_dp": 2}], ids=str)
def test_copies_together_give_what_one_gives(sizes: dict[str, Any], experts: str):
    x = torch.randn(11, SPEC.hidden)
    wanted, more = given(filled(build(SPEC)), x), {**sizes, "experts": experts, "eplb": True, "num_redundant_experts": 4}
    for seed in range(3):
        check_ranks(SPEC, x, wanted, more, random_map(SPEC.num_experts, SPEC.num_experts + 4, seed))


def test_a_fake_router_is_even():
    """Over rows, and over experts: no expert has more than one row more than another, and none is a row's twice."""
    moe = filled(build(SPEC, dispatch="fake", eplb=True))
    assert moe.loads is not None
    for num_rows in (1, 7, 64):
        moe.loads.zero_()
        given(moe, torch.randn(num_rows, SPEC.hidden))
        assert int(moe.loads.sum()) == num_rows * SPEC.num_experts_per_tok and int(moe.loads.max() - moe.loads.min()) <= 1
    weights, experts = route_evenly(torch.randn(50, 7), 3, True)
    assert torch.equal(weights.sum(1), torch.ones(50)) and all(len(set(row)) == 3 for row in experts.tolist())


def test_a_skewed_router_follows_zipf():
    """Each row chooses different experts; the first of 64 gets what Zipf's law says, of dummy logits whatever their size."""
    spec = replace(SPEC, num_experts=64, num_experts_per_tok=1)
    route = filled(build(spec, dispatch="skewed", eplb=True)).route
    _, first = route(0.02 * torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), 1, True)
    shares = torch.bincount(first.flatten(), minlength=64) / 20_000
    law = 1 / torch.arange(1.0, 65) / (1 / torch.arange(1.0, 65)).sum()
    assert float((shares - law).abs().sum()) < 0.25 and float(shares[:16].sum()) > 0.6
    weights, experts = route(torch.randn(50, 64), 3, True)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert all(len(set(row)) == 3 for row in experts.tolist())


def check_ranks(spec: Spec, x: torch.Tensor, wanted: torch.Tensor, sizes: dict[str, Any], map: np.ndarray | None = None) -> None:
    boards, num_rows = Boards(), len(x)

    def run(rank: int) -> None:
        rank_build = build(spec, rank, **sizes)
        moe, collectives = filled(rank_build, map), rank_build.collectives
        routes = []
        for regime in rank_build.plan.regimes:
            home = home_of(regime)
            there, back = Route(home, moe.takes.at(home), collectives), Route(moe.gives.at(home), home, collectives)
            routes.append((Deal(rank_build.plan, rank, np.array([num_rows]), regime), cut_of(home, collectives.mesh), there, back))
        collectives.begin(boards.groups(collectives))
        for deal, cut, there, back in routes:
            own = torch.from_numpy(deal.rows(cut))
            torch.testing.assert_close(back(given(moe, there(x[own], deal)), deal), wanted[own], atol=1e-5, rtol=1e-5)

    on_every_rank(Plan(layer_cut=(1,), **sizes).ranks, run, boards)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_a_gpu_skips_rows_of_other_ranks(num_rows: int):
    """It sorts them behind its own and learns no count: what two ranks owe is what a CPU gives."""
    spec, x = replace(SPEC, shared_intermediate=0), torch.randn(num_rows, SPEC.hidden)
    wanted, owed = given(filled(build(spec)), x), torch.zeros_like(x)
    for rank in range(2):
        device = torch.device("cuda")
        rank_build = replace(build(spec, rank, tp=2, ep=2), device=device, choices=Choices(device, torch.float32))
        owed += given(filled(rank_build), x.to(device)).cpu()
    torch.testing.assert_close(owed, wanted, atol=1e-4, rtol=1e-4)
