"""Plans: what settings make of a checkpoint, and the algebra of a stage's ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.models.spec import Rope, Spec
from trireme.parallel.plan import Plan

SPEC = Spec(
    family="llama",
    hidden=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab_size=49152,
    eps=1e-5,
    rope=Rope(theta=100_000.0),
    windows=(0,) * 30,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    dtype="bfloat16",
    sparse=(False,) * 30,
)


def plan_of(**settings) -> Plan:
    return Plan.of(make_settings({"model": "/m", **settings}), SPEC)


def test_the_cost_model_cuts_where_nobody_says():
    plan = plan_of(pipeline_parallel_size=2)
    assert plan.layer_cut == (19, 11)
    assert (plan.pp, plan.ranks, plan.world) == (2, 1, 2)
    assert (plan.layers(0), plan.layers(1)) == (range(19), range(19, 30))


def test_a_given_cut_is_kept():
    assert plan_of(pipeline_parallel_size=3, layer_cut=[1, 28, 1]).layer_cut == (1, 28, 1)


@pytest.mark.parametrize("cut", [[15, 15, 0], [10, 10, 11], [31, -2, 1]])
def test_a_cut_that_does_not_fit_is_refused(cut: list[int]):
    with pytest.raises(Refusal, match=r"cut 30 layers into 3 stages.*fix: use layer_cut="):
        plan_of(pipeline_parallel_size=3, layer_cut=cut)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(Refusal, match="31 stages for 30 layers"):
        plan_of(pipeline_parallel_size=31)


def test_tensor_parallel_stages_are_refused_for_now():
    with pytest.raises(Refusal, match="tensor_parallel_size=2"):
        plan_of(tensor_parallel_size=2)


def test_expert_axes_divide_the_ranks_of_a_stage():
    assert Plan(layer_cut=(1,), tp=4, cp=2, ep=4).moe_tp == 2
    with pytest.raises(Refusal, match="does not divide the 4 ranks"):
        Plan(layer_cut=(1,), tp=4, ep=3)
    with pytest.raises(Refusal, match="moe_dp=4 with cp=2"):
        Plan(layer_cut=(1,), tp=4, cp=2, moe_dp=4)
    with pytest.raises(Refusal, match="below one"):
        Plan(layer_cut=(1,), tp=0)


def test_a_plan_is_a_value():
    plan = Plan(layer_cut=(2, 3), tp=2)
    assert plan == Plan(layer_cut=(2, 3), tp=2) and hash(plan) != hash(replace(plan, sp=True))
