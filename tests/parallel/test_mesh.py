"""The mesh against SGLang's computed groups (facts/seeds.md 0), and the algebra that any mesh keeps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan


def ranks(mesh: Mesh, axis: str) -> list[tuple[int, ...]]:
    return [group.ranks for group in mesh.groups(axis)]


def test_the_command_of_context_parallel_qwen3():
    """Four ranks, tp=2 cp=2 ep=2 moe_dp=2."""
    mesh = Mesh(Plan(layer_cut=(1,), tp=2, cp=2, ep=2, moe_dp=2))
    assert ranks(mesh, "cp") == [(0, 2), (1, 3)]
    assert ranks(mesh, "tp") == [(0, 1), (2, 3)]
    assert ranks(mesh, "ep") == [(0, 1), (2, 3)]
    assert ranks(mesh, "moe_tp") == [(0,), (1,), (2,), (3,)]
    assert ranks(mesh, "moe_dp") == [(0, 2), (1, 3)]


def test_two_stages_of_eight():
    """tp=4 cp=2 ep=4, two stages."""
    mesh = Mesh(Plan(layer_cut=(1, 1), tp=4, cp=2, ep=4))
    assert ranks(mesh, "tp") == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert ranks(mesh, "cp")[:4] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert ranks(mesh, "ep") == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert ranks(mesh, "moe_tp") == [(i, i + 1) for i in range(0, 16, 2)]
    assert ranks(mesh, "pp") == [(i, i + 8) for i in range(8)]
    assert ranks(mesh, "stage") == [tuple(range(8)), tuple(range(8, 16))]


def test_one_rank_is_alone_on_every_axis():
    mesh = Mesh(Plan(layer_cut=(1,)))
    assert all(mesh.size(axis) == 1 and ranks(mesh, axis) == [(0,)] for axis in mesh.axes)


def test_a_rank_finds_its_group_and_place():
    mesh = Mesh(Plan(layer_cut=(1, 1), tp=4, cp=2))
    assert mesh.group("tp", 6).ranks == (4, 5, 6, 7) and mesh.place("tp", 6) == 2
    assert mesh.group("cp", 13).ranks == (9, 13) and mesh.place("cp", 13) == 1


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    tp, cp, pp = (draw(st.sampled_from((1, 2, 3, 4))) for _ in range(3))
    moe_dp = draw(st.sampled_from((1, cp)))
    ep = draw(st.sampled_from([n for n in range(1, tp * cp + 1) if tp * cp % (n * moe_dp) == 0]))
    return Plan(layer_cut=(1,) * pp, tp=tp, cp=cp, ep=ep, moe_dp=moe_dp)


@given(plans())
@settings(deadline=None)
def test_every_axis_deals_out_the_world_and_views_cross_in_one_rank(plan: Plan):
    mesh = Mesh(plan)
    for axis in mesh.axes:
        assert sorted(rank for group in ranks(mesh, axis) for rank in group) == list(range(plan.world))
        assert {len(group) for group in ranks(mesh, axis)} == {mesh.size(axis)}
    for view in (("pp", "cp", "tp"), ("pp", "moe_dp", "ep", "moe_tp")):
        places = {tuple(mesh.place(axis, rank) for axis in view) for rank in range(plan.world)}
        assert len(places) == plan.world
        for one in view:
            for other in set(view) - {one}:
                assert all(len(set(a) & set(b)) <= 1 for a in ranks(mesh, one) for b in ranks(mesh, other))


@given(plans())
def test_names_of_groups_are_unique_and_no_two_have_the_same_ranks(plan: Plan):
    groups = Mesh(plan).every_group()
    assert len({group.name for group in groups}) == len(groups)
    several = [group.ranks for group in groups if len(group.ranks) > 1]
    assert len(set(several)) == len(several)


@pytest.mark.parametrize("rank", range(8))
def test_both_views_count_the_same_ranks(rank: int):
    plan = Plan(layer_cut=(1,), tp=4, cp=2, ep=2, moe_dp=2)
    mesh = Mesh(plan)
    assert rank == mesh.place("cp", rank) * plan.tp + mesh.place("tp", rank)
    assert rank == (mesh.place("moe_dp", rank) * plan.ep + mesh.place("ep", rank)) * plan.moe_tp + mesh.place("moe_tp", rank)
