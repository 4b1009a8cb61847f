"""Placements: every row goes to a slot that holds its expert, all ranks that must agree do, and copies share fairly."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from trireme.core.maps import is_legal, trivial_map
from trireme.parallel.placement import Choice, Placement, fingerprint, slots_of, static_slots
from trireme_kernels.pick_slots.reference import pick_slots

EXPERTS = 8


def slots(placement: Placement, experts: torch.Tensor) -> torch.Tensor:
    return experts if placement.copies is None else pick_slots(experts, placement.copies, None, None)


def random_map(num_experts: int, num_slots: int, seed: int) -> np.ndarray:
    """Legal, and otherwise anything: also copies of one expert on one rank."""
    draw = np.random.default_rng(seed)
    more = draw.integers(num_experts, size=num_slots - num_experts)
    return draw.permutation(np.concatenate([np.arange(num_experts), more])).astype(np.int32)


def test_eight_experts_on_two_ranks():
    placement = Placement(EXPERTS, 2)
    experts = torch.tensor([[7, 0, 3], [4, 5, 6]])
    assert placement.slots_per_rank == 4
    assert (slots(placement, experts) // placement.slots_per_rank).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_the_documented_map():
    """Two ranks, copies of 0 and 5 on the second: even rows go to the first copy, odd ones to the second."""
    placement = Placement(EXPERTS, 2, 1, num_redundant=2)
    assert placement.map.tolist() == trivial_map(8, 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    placement.rewrite(np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 5]), 3)
    assert placement.here.tolist() == [5, 6, 7, 0, 5] and placement.version == 3
    assert slots(placement, torch.tensor([[0, 5, 6]] * 3)).tolist() == [[0, 5, 6], [8, 9, 6], [0, 5, 6]]


def test_the_documented_tables():
    every = slots_of(np.array([0, 1, 2, 0]), 3)
    assert every.tolist() == [[0, 3, 2], [1, 0, 1], [2, 0, 1]]
    assert [static_slots(every, 1, 4, rank)[0] for rank in range(4)] == [0, 0, 3, 3]


def test_what_is_no_map():
    assert is_legal(np.array([1, 0, 1]), 2, 3)
    for wrong in ([0, 0, 0], [0, 1], [0, 1, 2], [0, 1, -1]):
        assert not is_legal(np.array(wrong), 2, 3)
    with pytest.raises(AssertionError, match="not a map"):
        Placement(2, num_redundant=1).rewrite(np.zeros(3, int))


@pytest.mark.parametrize("num_redundant", [0, 4, 16])
@pytest.mark.parametrize("choice", get_args(Choice))
@pytest.mark.parametrize("seed", range(5))
def test_every_row_finds_its_experts(num_redundant: int, choice: Choice, seed: int):
    draw, num_ranks = torch.Generator().manual_seed(seed), 4
    map = random_map(EXPERTS, EXPERTS + num_redundant, seed)
    experts = torch.rand(50, EXPERTS, generator=draw).topk(3).indices
    for place in range(num_ranks):
        placement = Placement(EXPERTS, num_ranks, place, num_redundant=num_redundant, choice=choice)
        address = placement._table.data_ptr()
        placement.rewrite(map, 1)
        found = slots(placement, experts)
        assert torch.equal(torch.from_numpy(map)[found].long(), experts)
        assert placement._table.data_ptr() == address, "CUDA graphs read it there"


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_choice_is_every_ranks_and_fair(seed: int):
    """Copies of an expert that all rows want get as many rows, give or take one."""
    map = random_map(EXPERTS, 16, seed)
    experts = torch.arange(EXPERTS).expand(60, -1)
    picks = []
    for place in range(4):
        placement = Placement(EXPERTS, 4, place, num_redundant=8)
        placement.rewrite(map)
        picks.append(slots(placement, experts))
    assert all(torch.equal(each, picks[0]) for each in picks)
    for expert in range(EXPERTS):
        rows = Counter(picks[0][:, expert].tolist())
        assert set(rows) == set(np.flatnonzero(map == expert)) and max(rows.values()) - min(rows.values()) <= 1


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_static_choice_is_near_and_fair(num_ranks: int, seed: int):
    """A rank's own copy, and of those without one equally many at each copy, give or take one; no copy of the lowest number is
    everyone's."""
    map = random_map(EXPERTS, 16, seed)
    every, slots_per_rank = slots_of(map, EXPERTS), 16 // num_ranks
    chosen = np.stack([static_slots(every, slots_per_rank, num_ranks, rank) for rank in range(num_ranks)])
    for expert in range(EXPERTS):
        copies = np.flatnonzero(map == expert)
        having = set(copies // slots_per_rank)
        assert all(chosen[rank, expert] // slots_per_rank == rank for rank in having)
        others = Counter(chosen[rank, expert] for rank in range(num_ranks) if rank not in having)
        times = [others[copy] for copy in copies]
        assert sum(times) == num_ranks - len(having) and max(times) - min(times) <= 1


def test_turns_begin_elsewhere_for_each_expert():
    """Eight ranks, of which the first two have everything: half of the others' choices fall to each."""
    every = slots_of(np.concatenate([np.arange(8), np.arange(8)]), 8)
    odd_rank = static_slots(every, 8, 3, 2)
    assert Counter((odd_rank // 8).tolist()) == {0: 4, 1: 4}


def test_fingerprints_tell_picks_apart():
    picks = torch.randint(16, (40, 3), generator=torch.Generator().manual_seed(0))
    found = {int(fingerprint(picks))}
    for row in range(40):
        for other in (picks.clone(), picks.roll(1, 0), picks.flip(1), picks[:row]):
            if len(other) == 40 and torch.equal(other, picks):
                other[row, 1] += 1
            found.add(int(fingerprint(other)))
    assert len(found) == 1 + 40 + 2 + 40 and int(fingerprint(picks.clone())) in found
