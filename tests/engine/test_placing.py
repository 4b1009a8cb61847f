"""Placing: DeepSeek's worked example, what every map must be whatever the loads, and what each policy is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trireme.core.refusal import Refusal
from trireme.engine.eplb_file import read
from trireme.engine.placing import (
    Slots,
    balance,
    busy_s,
    held,
    pack,
    peak,
    place,
    place_globally,
    place_hierarchically,
    rank_loads,
    received,
    replicate,
    settle,
    trivial,
)

POLICIES = ("auto", "hierarchical", "global", "skew", "minimal")
RECORDED = Path(__file__).parent / "recorded" / "abacus-word-problems.safetensors"
SKEWED = Slots(num_experts=64, num_slots=80, num_ranks=4)


def test_worked_example_of_deepseek():
    """github.com/deepseek-ai/EPLB, README: two layers of 12 experts in 4 groups, 16 slots, 2 hosts of 4 GPUs."""
    slots = Slots(num_experts=12, num_slots=16, num_ranks=8, num_groups=4, num_nodes=2)
    loads = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
    assert [place_hierarchically(layer, slots).tolist() for layer in loads] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def draw_loads(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    """Windows [W, num_experts]: Zipf, uniform, a few spikes on nothing, or nothing at all."""
    num_windows = int(rng.integers(1, 4))
    match rng.integers(4):
        case 0:
            chances = rng.permutation(np.arange(1, num_experts + 1) ** -rng.uniform(0.3, 2.0))
            return rng.multinomial(int(rng.integers(10, 5000)), chances / chances.sum(), num_windows)
        case 1:
            return rng.integers(0, 100, (num_windows, num_experts))
        case 2:
            return (rng.random((num_windows, num_experts)) < 0.1) * rng.integers(1, 1000, (num_windows, num_experts))
        case _:
            return np.zeros((num_windows, num_experts), np.int64)


def draw_slots(rng: np.random.Generator) -> Slots:
    """Shapes small enough for many, some with less than a rank's slots in experts, where copies must meet."""
    num_ranks = int(rng.choice([1, 2, 4]))
    num_nodes = 2 if num_ranks == 4 and rng.random() < 0.5 else 1
    num_experts = int(rng.choice([4, 8, 12, 16]))
    num_slots = num_experts + int(rng.choice([0, 1, 2, num_experts])) * num_ranks
    slots = Slots(num_experts, num_slots, num_ranks, num_groups=4, num_nodes=num_nodes)
    return slots if slots.nests else slots._replace(num_nodes=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_map_is_sound(policy):
    """1,000 loads: each expert has a slot, no copies meet that need not, the balance is not worse than the trivial map's (over
    windows for the policy that looks at them), and renaming ranks and slots is all that `current` changes."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        slots = draw_slots(rng)
        windows = draw_loads(rng, slots.num_experts)
        current = settle(trivial(slots), place_globally(rng.random(slots.num_experts), slots), slots) if seed % 2 else trivial(slots)
        check_map(policy, windows, slots, place(policy, windows, slots, current))


def check_map(policy: str, windows: np.ndarray, slots: Slots, found: np.ndarray) -> None:
    copies = held(found, slots)
    assert found.shape == (slots.num_slots,) and found.dtype == np.int32
    assert copies.sum(axis=0).min() >= 1
    assert copies.max() == 1 or slots.per_rank > slots.num_experts
    if policy == "skew":
        assert peak(found, windows, slots) <= peak(trivial(slots), windows, slots) + 1e-6
    else:
        loads = windows.sum(axis=0)
        assert balance(found, loads, slots) >= balance(trivial(slots), loads, slots) - 1e-9


@pytest.mark.parametrize("num_redundant", [0, 4, 8])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_maps_of_recorded_loads_are_sound(policy, num_ranks, num_redundant):
    """The trained small model's on word problems, 64 pushes of 8 layers of 16 experts (tools/measurements/2026-11-22-eplb.md says how they
    were recorded): of all, and as a server sees them, where each map begins from the one before."""
    every = read(RECORDED).stage(0, "loads")
    assert every is not None and every.shape == (64, 8, 16)
    slots = Slots(16, 16 + num_redundant, num_ranks)
    for layer in range(8):
        current = trivial(slots)
        for first in range(0, 64, 16):
            windows = every[first : first + 16, layer]
            current = place(policy, windows, slots, current)
            check_map(policy, windows, slots, current)
        whole = place(policy, every[:, layer], slots)
        check_map(policy, every[:, layer], slots, whole)
        if num_redundant:
            assert balance(whole, every[:, layer].sum(axis=0), slots) > 0.9


@pytest.mark.parametrize("policy", POLICIES)
def test_zipf_loads_are_balanced(policy):
    loads = np.random.default_rng(0).permutation(1 / np.arange(1, 65))
    plain = SKEWED._replace(num_slots=64)
    assert balance(trivial(plain), loads, plain) < 0.8
    assert balance(place(policy, loads, SKEWED), loads, SKEWED) > 0.94
    worst = 1 / np.arange(1, 65)  # the busiest experts side by side
    assert balance(trivial(plain), worst, plain) < 0.36
    assert balance(place(policy, worst, SKEWED), worst, SKEWED) > 0.94


def test_skew_sees_experts_that_are_busy_together():
    """Experts 0 and 1 are busy in the same windows, 2 and 3 in the others; sums are all equal and say nothing."""
    slots = Slots(num_experts=4, num_slots=4, num_ranks=2)
    windows = np.array([[8, 8, 0, 0], [0, 0, 8, 8]] * 4)
    blind, seeing = place("global", windows, slots, trivial(slots)), place("skew", windows, slots)
    assert peak(blind, windows, slots) >= peak(seeing, windows, slots) == 8 * 8
    assert balance(seeing, windows[0], slots) == 1.0


def test_skew_holds_for_windows_it_has_not_seen():
    """Windows are mixtures of six topics with experts of their own."""
    rng = np.random.default_rng(0)
    slots = Slots(num_experts=32, num_slots=40, num_ranks=4)
    topics = rng.dirichlet(np.full(32, 0.2), 6)
    windows = np.array([rng.multinomial(4000, rng.dirichlet(np.full(6, 0.3)) @ topics) for _ in range(232)])
    seen, unseen = windows[:32], windows[32:]
    assert peak(place("skew", seen, slots), unseen, slots) < 0.9 * peak(place("global", seen, slots), unseen, slots)


def test_minimal_moves_fewer():
    """Loads drift: `global` starts afresh, `minimal` moves a few for nearly the same balance."""
    rng = np.random.default_rng(0)
    loads = rng.permutation(1 / np.arange(1, 65) ** 0.7)
    current = place("global", loads, SKEWED)
    drifted = loads * np.exp(rng.normal(0, 1.5, 64))
    found = {policy: place(policy, drifted, SKEWED, current) for policy in ("global", "minimal")}
    moved = {policy: received(current, map_, SKEWED).sum() for policy, map_ in found.items()}
    assert balance(current, drifted, SKEWED) < 0.9 < 0.94 < balance(found["minimal"], drifted, SKEWED)
    assert 0 < moved["minimal"] <= moved["global"] / 2


def test_minimal_stays_where_it_is_well():
    loads = np.ones(64)
    assert (place("minimal", loads, SKEWED._replace(num_slots=64)) == np.arange(64)).all()


def test_copies_share_a_load():
    slots = Slots(num_experts=3, num_slots=4, num_ranks=2)
    assert rank_loads(np.array([0, 1, 0, 2]), np.array([6, 2, 4]), slots).tolist() == [5, 7]
    assert balance(np.array([0, 1, 0, 2]), np.array([6, 2, 4]), slots) == pytest.approx(6 / 7)
    assert balance(np.array([[0, 1, 0, 2]] * 2), np.array([[6, 2, 4], [0, 0, 0]]), slots) == pytest.approx((6 / 7 + 1) / 2)


def test_busiest_experts_are_copied_to_different_ranks():
    """Equal loads after copying: packing alone would put both copies of expert 0 on one rank at the end."""
    assert replicate(np.array([8.0, 1.0, 1.0]), 5, most=2).tolist() == [0, 1, 2, 0, 1]
    packs = pack(np.array([5.0, 4.0, 1.0, 1.0]), 2, [1, 2, 0, 0])
    assert [sorted([1, 2, 0, 0][item] for item in packed) for packed in packs] == [[0, 1], [0, 2]]


def test_a_full_pack_gives_way_to_a_copy():
    """The last item finds room only beside its twin: the other pack takes it and gives an item back."""
    names = [0, 1, 2, 3, 9, 9]
    packs = pack(np.array([10.0, 1.0, 1.0, 1.0, 0.5, 0.4]), 2, names)
    assert sorted(item for packed in packs for item in packed) == list(range(6))
    assert all(len({names[item] for item in packed}) == 3 for packed in packs)


def test_what_a_rank_has_stays_in_its_slot():
    slots = Slots(num_experts=5, num_slots=4, num_ranks=2)
    assert settle(np.array([0, 1, 2, 3]), np.array([3, 2, 1, 4]), slots).tolist() == [4, 1, 2, 3]
    apart = slots._replace(num_nodes=2)  # ranks of different hosts are not alike
    assert settle(np.array([0, 1, 2, 3]), np.array([3, 2, 1, 4]), apart).tolist() == [3, 2, 1, 4]


def test_moves_are_what_ranks_lack():
    old, new = np.array([0, 1, 2, 3]), np.array([1, 1, 2, 0])
    assert received(old, new, Slots(4, 4, 2)).tolist() == [0, 1]  # a second copy of 1 is at hand, 0 is not
    assert received(old, np.array([3, 3, 2, 0]), Slots(4, 4, 2)).tolist() == [1, 1]  # who wants an expert twice receives it once


def test_refusals():
    with pytest.raises(Refusal, match="15 slots for 16 experts"):
        Slots(16, 15, 5).check()
    with pytest.raises(Refusal, match="set num_redundant_experts to 2 plus a multiple of 6"):
        Slots(16, 17, 6).check()
    with pytest.raises(Refusal, match="do not nest"):
        place("hierarchical", np.ones(9), Slots(9, 9, 3, num_groups=3, num_nodes=2))


def test_the_busiest_rank_takes_as_long_as_its_rows_or_as_the_weights_that_it_reads():
    slots, loads, placed = Slots(4, 4, 2), np.array([30, 10, 10, 10]), np.arange(4)
    one, ten = np.array([1]), np.array([10])
    assert busy_s(placed, loads, one, slots, 1.0, 2.0) == pytest.approx(40)
    assert busy_s(placed, loads, one, slots, 1.0, 50.0) == pytest.approx(2 * 50, rel=1e-4)
    few = 2 * 10 * 50 * (1 - np.exp(-1))  # of the rank whose experts have a row in a step
    assert busy_s(placed, np.array([10, 10, 0, 0]), ten, slots, 1.0, 50.0) == pytest.approx(few)
    halves = np.stack([loads, loads[::-1]])  # the busiest of each window
    assert busy_s(placed, halves, np.array([1, 1]), slots, 1.0, 2.0) == pytest.approx(2 * 40)
