"""Relocation: after a commit every slot holds the expert that the new map names, all of it, whatever the plan; and what comes wrong
is named and dropped."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch

from threads import Boards, ThreadGroup, on_every_rank
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import LinkLost, StoreHost, form_group, reach_store
from trireme.parallel.mesh import Mesh
from trireme.parallel.placement import Placement
from trireme.parallel.plan import Plan
from trireme.parallel.relocation import Mixture, Move, Relocation, Unprepared, find_moves

EXPERTS, LAYERS = 8, 3
PLANS = {
    "ep2": Plan(layer_cut=(1,), tp=2, ep=2),
    "ep4": Plan(layer_cut=(1,), tp=4, ep=4),
    "ep2 moe_tp2": Plan(layer_cut=(1,), tp=4, ep=2),
    "ep2 moe_dp2": Plan(layer_cut=(1,), tp=2, cp=2, ep=2, moe_dp=2),
    "ep2 moe_tp2 moe_dp2": Plan(layer_cut=(1,), tp=4, cp=2, ep=2, moe_dp=2),
    "ep4 moe_tp2": Plan(layer_cut=(1,), tp=8, ep=4),
}


def legal_map(rng: np.random.Generator, num_slots: int) -> np.ndarray:
    """Any experts in any slots, each at least once."""
    return rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(EXPERTS, size=num_slots - EXPERTS)])).astype(np.int32)


class Stage:
    """Ranks of a stage, with experts whose numbers say which they are, of which layer and which part of them: a matrix of odd size
    that moe_tp cuts, and a scale of another type."""

    def __init__(self, plan: Plan, num_redundant: int = 0, most_layers: int = LAYERS):
        self.plan, self.boards, self.num_slots = plan, Boards(), EXPERTS + num_redundant
        self.relocations, self.mixtures, self.collectives = [], [], []
        for rank in range(plan.ranks):
            collectives = Collectives(Mesh(plan), rank)
            spans = collectives.mesh.spans
            mixtures = []
            for layer in range(LAYERS):
                placement = Placement(EXPERTS, plan.ep, spans["ep"].place(rank), num_redundant=num_redundant)
                parts = [self.parts(layer, expert, spans["moe_tp"].place(rank)) for expert in placement.here]
                mixtures.append(Mixture(placement, [torch.stack(each) for each in zip(*parts, strict=True)]))
            self.relocations.append(Relocation(collectives.along("ep", use="eplb"), mixtures, most_layers=most_layers))
            self.mixtures.append(mixtures)
            self.collectives.append(collectives)
            collectives.begin(self.boards.groups(collectives))

    @staticmethod
    def parts(layer: int, expert: int, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(int(1000 * layer + 10 * expert + column))
        return torch.randn(3, 5, generator=draw).to(torch.bfloat16), torch.rand((), generator=draw)

    def prepare(self, version: int, maps: dict[int, np.ndarray]) -> list[int]:
        return on_every_rank(self.plan.ranks, lambda rank: self.relocations[rank].prepare(version, maps), self.boards)

    def check(self, maps: dict[int, np.ndarray]) -> None:
        """Every rank has what these maps say, bit by bit."""
        for rank, mixtures in enumerate(self.mixtures):
            for layer, (placement, params) in enumerate(mixtures):
                np.testing.assert_array_equal(placement.map, maps[layer])
                for slot, expert in enumerate(placement.here):
                    column = self.collectives[rank].mesh.spans["moe_tp"].place(rank)
                    for param, part in zip(params, self.parts(layer, int(expert), column), strict=True):
                        assert torch.equal(param[slot], part), f"rank {rank} layer {layer} slot {slot}"

    @property
    def maps(self) -> dict[int, np.ndarray]:
        return {layer: mixture.placement.map for layer, mixture in enumerate(self.mixtures[0])}


def test_moves_are_local_where_they_can_be_and_spread_over_holders():
    old, new = np.array([0, 1, 2, 0]), np.array([1, 0, 2, 1])
    assert find_moves({5: old}, {5: new}, 2) == [Move(5, 1, 1, 0), Move(5, 0, 0, 1), Move(5, 1, 1, 3)]
    crowd = np.array([0, 1, 0, 2, 3, 4, 5, 6])  # two ranks have expert 0, two want it
    wants = np.array([0, 1, 0, 2, 0, 4, 0, 6])
    assert [move.source for move in find_moves({0: crowd}, {0: wants}, 2)] == [0, 2]
    assert find_moves({0: old}, {0: old}, 2) == []


@pytest.mark.parametrize("num_redundant", [0, 4, 8])
@pytest.mark.parametrize("plan", PLANS)
def test_slots_hold_what_maps_name(plan: str, num_redundant: int):
    stage, rng = Stage(PLANS[plan], num_redundant), np.random.default_rng(0)
    stage.check(stage.maps)
    for version in range(1, 6):
        layers = range(LAYERS) if version % 2 else [version % LAYERS]
        before, maps = stage.maps, {layer: legal_map(rng, stage.num_slots) for layer in layers}
        moved = stage.prepare(version, maps)
        stage.check(before)  # steps go on with these
        assert {relocation.staged for relocation in stage.relocations} == {version}
        if version == 4:
            for relocation in stage.relocations:
                relocation.drop()
            stage.check(before)
            continue
        for relocation in stage.relocations:
            relocation.commit(version)
        stage.check(before | maps)
        assert sum(moved) or PLANS[plan].ep * EXPERTS <= stage.num_slots, "unless each rank has all of them"
        assert {relocation.version for relocation in stage.relocations} == {version}


def test_only_ranks_along_ep_speak_and_in_chunks():
    stage = Stage(PLANS["ep2 moe_tp2"])
    swap = np.roll(np.arange(EXPERTS), EXPERTS // 2).astype(np.int32)
    moved = stage.prepare(1, {0: swap, 2: swap})
    size = 3 * 5 * 2 + 2 + 16 + 16  # both parts, padded to 16 bytes each, and the seal
    assert moved == [EXPERTS * size] * 4
    for traffic in stage.boards.traffic.values():
        assert traffic.calls == ["all_to_all ep.eplb"] * 2
        assert traffic.num_bytes == EXPERTS * size


@pytest.mark.parametrize("at", [0, 35, 48, 56], ids=["weight", "padding", "canary", "checksum"])
def test_spoilt_bytes_are_named_and_dropped(monkeypatch, at: int):
    """On one rank, in one chunk: the others are ready, and the next attempt succeeds."""
    stage = Stage(PLANS["ep2"], num_redundant=4)
    before, maps = stage.maps, {1: np.roll(stage.maps[1], 6)}
    sound, spoil = ThreadGroup.all_to_all, [True]

    def all_to_all(self, x, sent, received):
        came = sound(self, x, sent, received)
        if self._place == 1 and len(came) and spoil:
            spoil.pop()
            came[1, at] ^= 1
        return came

    monkeypatch.setattr(ThreadGroup, "all_to_all", all_to_all)

    def attempt(rank: int) -> str:
        try:
            stage.relocations[rank].prepare(1, maps)
        except Unprepared as unprepared:
            return str(unprepared)
        return ""

    told = on_every_rank(2, attempt, stage.boards)
    assert told[0] == "" and re.fullmatch(r"came spoilt: expert \d of layer 1 for slot \d+", told[1])
    assert [relocation.staged for relocation in stage.relocations] == [1, 0]
    stage.check(before)
    stage.prepare(2, maps)
    for relocation in stage.relocations:
        relocation.commit(2)
    stage.check(before | maps)


@pytest.mark.parametrize("way", ["copied", "hosts", "wrong"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_way_is_walked_and_every_expert_stays(monkeypatch, plan: str, way: str):
    """All that a warm-up does on a GPU, and then goes by. Memory that shows other bytes to one rank is given up by all of a group."""
    stage, rng = Stage(PLANS[plan], num_redundant=4), np.random.default_rng(0)
    stage.prepare(1, {1: np.roll(stage.maps[1], 6)})
    for relocation in stage.relocations:
        relocation.commit(1)
    maps = stage.maps
    if way != "hosts":  # here all ranks are of one process
        memories = {relocation._sent.data_ptr(): relocation._sent for relocation in stage.relocations}
        monkeypatch.setattr("trireme.parallel.mapping.offer", lambda memory, others: {"at": memory.data_ptr()})
        monkeypatch.setattr("trireme.parallel.mapping.mapped", lambda offered, place, device: memories[offered["at"]].view(-1))

    def walk(rank: int) -> str:
        relocation = stage.relocations[rank]

        def see(group) -> str:
            told = Relocation._map(relocation, group)
            if relocation._along.place == 1:
                relocation._sources[0] = torch.ones_like(relocation._sent)
            return told

        if way == "wrong":
            relocation._map = see  # pyright: ignore[reportAttributeAccessIssue]
        with relocation._along.held() as group:
            return relocation._meet(group)

    told = set(on_every_rank(stage.plan.ranks, walk, stage.boards))
    wrong, unseen = "what came out of another's memory was not what was sent", "memory cannot be shared"
    by = {
        "copied": "experts are copied",
        "hosts": f"experts go by way of the hosts: {unseen}",
        "wrong": f"experts go by way of the hosts: {wrong}",
    }
    assert len(told) == 1 and told.pop().startswith(by[way])
    stage.check(maps)
    for version in range(2, 5):
        new = {layer: legal_map(rng, stage.num_slots) for layer in range(LAYERS)}
        assert sum(stage.prepare(version, new)) > 0
        for relocation in stage.relocations:
            relocation.commit(version)
        stage.check(new)


def test_large_experts_go_one_at_a_time(monkeypatch):
    monkeypatch.setattr("trireme.parallel.relocation._CHUNK_BYTES", 100)  # of 64 bytes each
    stage = Stage(PLANS["ep2"])
    before, swap = stage.maps, np.roll(np.arange(EXPERTS), EXPERTS // 2).astype(np.int32)
    stage.prepare(1, {0: swap})
    assert [len(traffic.calls) for traffic in stage.boards.traffic.values()] == [4, 4]
    for relocation in stage.relocations:
        relocation.commit(1)
    stage.check(before | {0: swap})


def test_maps_that_fit_nothing_are_refused():
    stage = Stage(PLANS["ep2"], most_layers=1)
    lacking, whole = np.zeros(EXPERTS, np.int32), np.arange(EXPERTS, dtype=np.int32)
    for maps in ({0: lacking}, {LAYERS: whole}, {0: whole[:-1]}, {0: whole, 1: whole}):
        with pytest.raises(Unprepared, match="version 1"):
            stage.relocations[0].prepare(1, maps)


def test_a_rank_that_fails_frees_the_others_and_prepares_nothing_more_in_this_epoch(monkeypatch):
    stage = Stage(PLANS["ep2"])
    maps = {0: np.roll(stage.maps[0], 4)}
    monkeypatch.setattr(stage.relocations[1], "_write", lambda move, record: 1 / 0)  # also of what stays on the rank
    with pytest.raises(ZeroDivisionError):
        stage.prepare(1, maps)
    with pytest.raises(LinkLost):  # its group is gone, those of the steps are not
        stage.relocations[1].prepare(2, maps)
    assert [relocation.staged for relocation in stage.relocations] == [0, 0]


def test_the_end_of_an_epoch_waits_for_no_thread_and_frees_it():
    """Rank 0 waits in its thread for rank 1, which never comes: neither rank's own thread is held up when it leaves."""
    host = StoreHost(20.0)
    ranks = range(2)
    groups = on_every_rank(2, lambda rank: form_group(reach_store(host.address, 20.0), 1, "ep.eplb", rank, 2, 20.0, torch.device("cpu")))
    every = [Collectives(Mesh(PLANS["ep2"]), rank) for rank in ranks]
    alongs = [collectives.along("ep", use="eplb") for collectives in every]
    for collectives, group in zip(every, groups, strict=True):
        collectives.begin({collectives.spans[0]: group})
    del groups, group
    told: list[str] = []

    def wait() -> None:
        try:
            with alongs[0].held() as group:
                group.all_to_all(torch.zeros(2, 3), [1, 1], [1, 1])
        except LinkLost as lost:
            told.append(str(lost))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    for collectives in every:
        collectives.leave()
    assert time.monotonic() - began < 5
    thread.join(5)
    assert not thread.is_alive() and len(told) == 1
