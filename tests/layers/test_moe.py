"""Moe blocks of many ranks against the block of one: what ranks owe adds up, and the shared expert is counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layers.test_param import build
from threads import Boards, on_every_rank
from tiny import tiny_config
from trireme.layers.block import Build
from trireme.layers.linear import Linear
from trireme.layers.moe import Moe
from trireme.layers.param import Param
from trireme.models.spec import make_spec
from trireme.parallel.deal import Deal
from trireme.parallel.layout import cut_of, home_of
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Route
from trireme_kernels.choose import Choices

SPEC = make_spec(tiny_config("qwen2_moe").to_dict())


def filled(rank_build: Build) -> Moe:
    """A rank's block, with its slices of the weights that every plan has."""
    moe = Moe(rank_build, 1)
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
    wanted = filled(build(spec))(x, None)
    boards = Boards()

    def run(rank: int) -> None:
        rank_build = build(spec, rank, **sizes, experts=experts)
        moe, collectives = filled(rank_build), rank_build.collectives
        routes = []
        for regime in rank_build.plan.regimes:
            home = home_of(regime)
            there, back = Route(home, moe.takes.at(home), collectives), Route(moe.gives.at(home), home, collectives)
            routes.append((Deal(rank_build.plan, rank, np.array([num_rows]), regime), cut_of(home, collectives.mesh), there, back))
        collectives.begin(boards.groups(collectives))
        for deal, cut, there, back in routes:
            own = torch.from_numpy(deal.rows(cut))
            torch.testing.assert_close(back(moe(there(x[own], deal), None), deal), wanted[own], atol=1e-5, rtol=1e-5)

    on_every_rank(Plan(layer_cut=(1,), **sizes).ranks, run, boards)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_a_gpu_skips_rows_of_other_ranks(num_rows: int):
    """It sorts them behind its own and learns no count: what two ranks owe is what a CPU gives."""
    spec, x = replace(SPEC, shared_intermediate=0), torch.randn(num_rows, SPEC.hidden)
    wanted, owed = filled(build(spec))(x, None), torch.zeros_like(x)
    for rank in range(2):
        device = torch.device("cuda")
        rank_build = replace(build(spec, rank, tp=2, ep=2), device=device, choices=Choices(device, torch.float32))
        owed += filled(rank_build)(x.to(device), None).cpu()
    torch.testing.assert_close(owed, wanted, atol=1e-4, rtol=1e-4)
