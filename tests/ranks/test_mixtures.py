"""What a rank does for the balance of experts: maps that the whole stage has, loads that are read once, copies chosen alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from threads import Boards, on_every_rank
from trireme.core.settings import make_settings
from trireme.core.step import array
from trireme.parallel.collectives import Collectives
from trireme.parallel.mesh import Mesh
from trireme.parallel.placement import Placement
from trireme.parallel.plan import Plan
from trireme.ranks.mixtures import MapLost, Mixtures

EXPERTS, PLAN = 4, Plan(layer_cut=(1,), tp=2, ep=2, eplb=True)
SETTINGS = make_settings({"model": "m", "eplb": {}})


class Stage:
    """Two ranks with two layers of experts, each a number."""

    def __init__(self, version: int = 0):
        boards, self.layers, self.ranks = Boards(), [], []
        for rank in range(2):
            collectives = Collectives(Mesh(PLAN), rank)
            layers = [self.layer(rank) for _ in range(2)]
            build = SimpleNamespace(plan=PLAN, collectives=collectives, map_version=version, device=torch.device("cpu"))
            decoder: Any = SimpleNamespace(build=build, mixtures=layers)
            self.ranks.append(Mixtures(decoder, SETTINGS))
            self.layers.append(layers)
            collectives.begin(boards.groups(collectives))
        self.boards = boards

    @staticmethod
    def layer(rank: int) -> SimpleNamespace:
        placement = Placement(EXPERTS, 2, rank)
        weight: Any = torch.tensor(placement.here, dtype=torch.float32)
        weight.cuts = [SimpleNamespace(stacked=True)]
        norm: Any = torch.ones(3)
        norm.cuts = [SimpleNamespace(stacked=False)]
        loads = torch.zeros(EXPERTS, dtype=torch.int32) if rank == 0 else None
        strategy = SimpleNamespace(owes="experts")
        return SimpleNamespace(
            placement=placement, weight=weight, parameters=lambda: [weight, norm], loads=loads, picks=None, strategy=strategy
        )

    def prepare(self, version: int, map: list[int]) -> None:
        maps = {1: np.array(map, np.int32)}
        on_every_rank(2, lambda rank: self.ranks[rank].prepare(version, maps), self.boards)

    @property
    def experts(self) -> list[list[float]]:
        """In the slots of each rank, of layer 1."""
        return [layers[1].weight.tolist() for layers in self.layers]


def test_a_rank_follows_the_others_at_the_end_of_an_epoch():
    """Rank 0 computed a step with the new maps, rank 1 never saw it; both begin the next epoch with them."""
    stage = Stage(version=4)
    stage.prepare(5, [2, 1, 0, 3])
    stage.ranks[0].commit(5)
    assert stage.experts == [[2, 1], [2, 3]]
    for rank in stage.ranks:
        rank.settle(5)
    assert stage.experts == [[2, 1], [0, 3]]
    assert [rank.version for rank in stage.ranks] == [5, 5]


def test_what_is_not_in_force_at_the_end_of_an_epoch_is_dropped():
    stage = Stage(version=4)
    stage.prepare(5, [2, 1, 0, 3])
    for rank in stage.ranks:
        rank.settle(4)
        with pytest.raises(MapLost, match=r"version 5 are neither in force \(4\) nor laid ready \(0\)"):
            rank.commit(5)
    assert stage.experts == [[0, 1], [2, 3]]


def test_loads_are_read_once_by_the_rank_that_counts():
    stage = Stage()
    for number, layer in enumerate(stage.layers[0]):
        layer.loads += torch.arange(EXPERTS) + number
    told = [rank.report(eager=False) for rank in stage.ranks]
    stage.layers[0][0].loads += 9  # a step after it, before the report is read
    assert array(told[0]()).tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
    assert told[1]() == b""
    assert array(stage.ranks[0].report(eager=False)()).tolist() == [9] * 4 + [0] * 4


@pytest.mark.parametrize("differs", [False, True])
def test_ranks_that_chose_other_copies_are_caught(differs: bool):
    stage = Stage()
    for rank, layers in enumerate(stage.layers):
        layers[0].picks = torch.tensor([[0, 2], [1, 3]])
        layers[1].picks = torch.tensor([[0, 2], [3, 1] if differs and rank else [1, 3]])
    told = on_every_rank(2, lambda rank: stage.ranks[rank].report(eager=True), stage.boards)
    for read in told:
        if differs:
            with pytest.raises(RuntimeError, match=r"chose other copies of experts than each other, in layers \[1\]"):
                read()
        else:
            read()
