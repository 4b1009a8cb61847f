"""Bytes on the wire: worked examples, and the same collectives as a decoder's own seams."""

from __future__ import annotations

from collections import Counter

import pytest

from models.test_cost import empty_stage, spec_of
from parallel.test_plan import SPEC
from trireme.core.step import Regime
from trireme.models.wire import edge_bytes, sent, stage_wire
from trireme.parallel.plan import Plan

PLANS = [
    Plan(layer_cut=(2, 3), tp=3),
    Plan(layer_cut=(5,), tp=3, sp=True),
    Plan(layer_cut=(1, 4), cp=2),
    Plan(layer_cut=(1, 2, 2), tp=3, cp=2, sp=True),
    Plan(layer_cut=(2, 3), tp=3, cp=2, sp=True, whole_edges=True),
    Plan(layer_cut=(2, 3), tp=2, ep=2),
    Plan(layer_cut=(2, 3), tp=2, ep=2, sp=True, experts="dispatched"),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, sp=True),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, sp=True),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=4, experts="dispatched"),
]


def test_shares_of_a_buffer():
    """Of 800 bytes among four ranks; one rank sends nothing."""
    collectives = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    assert [sent(collective, 4, 800) for collective in collectives] == [1200, 600, 600, 600]
    assert not any(sent(collective, 1, 800) for collective in collectives)


def test_two_sums_a_layer():
    """SmolLM2-135M on three ranks, 64 rows of 576 numbers of two bytes: the embedding's sum and two a layer."""
    wire = stage_wire(SPEC, Plan(layer_cut=(30,), tp=3), 0, 64, Regime(), 2)
    assert wire == (61, pytest.approx(61 * 2 * 2 / 3 * 64 * 576 * 2))


def test_sp_moves_what_tp_moves():
    plan = Plan(layer_cut=(30,), tp=3, sp=True)
    whole, cut = (stage_wire(SPEC, plan, 0, 66, Regime(sp=sp), 2) for sp in (False, True))
    assert cut.num_bytes == pytest.approx(whole.num_bytes) and cut.calls == 2 * whole.calls


def test_edges_carry_a_ranks_own_rows():
    plan = Plan(layer_cut=(15, 15), tp=3, cp=2, sp=True)
    regimes = [Regime(sp, cp) for sp in (False, True) for cp in (False, True)]
    assert [edge_bytes(SPEC, plan, 60, regime, 2) // (576 * 2) for regime in regimes] == [60, 30, 20, 10]
    whole = Plan(layer_cut=(15, 15), tp=3, cp=2, sp=True, whole_edges=True)
    assert {edge_bytes(SPEC, whole, 60, regime, 2) // (576 * 2) for regime in regimes} == {60}


def test_keys_and_values_along_cp():
    """Three heads of keys and values of 64 numbers in each of 30 layers, gathered from two halves; and at last the rows, since
    sampled ones may be on either rank."""
    wire = stage_wire(SPEC, Plan(layer_cut=(30,), cp=2), 0, 64, Regime(cp=True), 2)
    assert wire == (31, pytest.approx(30 / 2 * 64 * 2 * 3 * 64 * 2 + 64 * 576 * 2 / 2))


def test_dispatched_rows_go_and_come_back():
    """Five layers of eight experts on two ranks: each sends half of its 8 rows' three copies to the other and gets them back,
    with a count for each slot; no row is gathered, none is a sum."""
    spec = spec_of("qwen3_moe", mlp_only_layers=[])
    wire = stage_wire(spec, Plan(layer_cut=(2, 3), cp=2, ep=2, experts="dispatched"), 0, 16, Regime(cp=True), 4)
    exchanged = 2 * (2 * 8 * 3 * 48 * 4 + 8 * 8) / 2
    kept = 2 * 16 * 2 * 3 * 10 * 4 / 2
    assert wire == (2 * 3 + 2, pytest.approx(exchanged + kept))


def test_states_along_cp_have_one_size():
    """Four layers of the delta rule of five, on four ranks. Each sends three others what two chunks of each of three items do to
    any state, and the last three inputs of their convolution."""
    spec = spec_of("qwen3_5", layer_types=["linear_attention"] * 4 + ["full_attention"])
    item = 4 * 10 * (6 + 10) * 4 + 3 * (2 * 2 * 10 + 4 * 6) * 4
    for rows in (64, 640):
        wire = stage_wire(spec, Plan(layer_cut=(5,), cp=4), 0, rows, Regime(cp=True), 4, num_items=3)
        kept = 3 / 4 * rows * 2 * 3 * 20 * 4
        assert wire == (4 * 2 + 1 + 1, pytest.approx(4 * 3 * 2 * 3 * item + kept + 3 / 4 * rows * 48 * 4))


HYBRID_PLANS = [
    Plan(layer_cut=(1, 3, 1), tp=3, sp=True),
    Plan(layer_cut=(2, 3), tp=3, cp=2, sp=True, mtp=2),
    Plan(layer_cut=(5,), tp=3, mtp=1),
    Plan(layer_cut=(2, 3), tp=3, sp=True, whole_edges=True, mtp=3),
    Plan(layer_cut=(5,), cp=4, ep=4, mtp=3),
    Plan(layer_cut=(2, 3), cp=2, ep=2, experts="dispatched", mtp=3),
]


@pytest.mark.parametrize("plan", PLANS + HYBRID_PLANS, ids=str)
def test_the_collectives_are_the_decoders(plan: Plan):
    has_experts, sizes = plan.ep > 1 or plan.moe_dp > 1, {"intermediate_size": 90, "num_attention_heads": 12, "num_key_value_heads": 6}
    if plan in HYBRID_PLANS:
        family = "qwen3_5_moe" if has_experts else "qwen3_5"
        spec = spec_of(family, **sizes, linear_num_key_heads=6, linear_num_value_heads=6)
    else:
        spec = spec_of("qwen3_moe" if has_experts else "qwen3", **sizes)
    for stage in range(plan.pp):
        collectives = collectives_of(empty_stage(spec, plan, stage, 0).schedule())
        for regime in plan.regimes:
            assert stage_wire(spec, plan, stage, 24, regime, 4).calls == collectives[str(regime)], regime


def collectives_of(schedule: list[str]) -> Counter[str]:
    """Collectives under each heading of a schedule. Slices send nothing."""
    found, heading = Counter(), ""
    for line in schedule:
        if not line.startswith(" "):
            heading = line
        found[heading] += sum(line.count(name) for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"))
    return found
