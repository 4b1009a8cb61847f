"""Plans: what settings make of a checkpoint, and the algebra of a stage's ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from real_configs import QWEN3_5_35B
from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.core.step import Regime
from trireme.models.spec import Delta, Rope, Spec, make_spec
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
    assert plan.layer_cut == (16, 14)
    assert (plan.pp, plan.ranks, plan.world) == (2, 1, 2)
    assert (plan.layers(0), plan.layers(1)) == (range(16), range(16, 30))


def test_a_given_cut_is_kept():
    assert plan_of(pipeline_parallel_size=3, layer_cut=[1, 28, 1]).layer_cut == (1, 28, 1)


@pytest.mark.parametrize("cut", [[15, 15, 0], [10, 10, 11], [31, -2, 1]])
def test_a_cut_that_does_not_fit_is_refused(cut: list[int]):
    with pytest.raises(Refusal, match=r"cut 30 layers into 3 stages.*fix: use layer_cut="):
        plan_of(pipeline_parallel_size=3, layer_cut=cut)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(Refusal, match="31 stages for 30 layers"):
        plan_of(pipeline_parallel_size=31)


def test_settings_make_every_axis():
    plan = plan_of(pipeline_parallel_size=2, tensor_parallel_size=3, context_parallel_size=2, sequence_parallel="on", link="tensor")
    assert (plan.tp, plan.cp, plan.ranks, plan.world, plan.sp, plan.whole_edges) == (3, 2, 6, 12, True, True)
    assert str(plan) == "pp2 tp3 cp2 sp"
    assert plan.regimes == (Regime(), Regime(cp=True), Regime(sp=True), Regime(sp=True, cp=True))
    assert plan_of().regimes == (Regime(),) and str(plan_of()) == "one rank"


MOE = replace(
    SPEC,
    family="qwen3_moe",
    num_heads=32,
    num_kv_heads=4,
    sparse=(True,) * 30,
    num_experts=12,
    num_experts_per_tok=2,
    moe_intermediate=96,
)
HYBRID = replace(
    SPEC,
    family="qwen3_5",
    num_heads=32,
    num_kv_heads=4,
    linear=(True, True, False) * 10,
    delta=Delta(num_key_heads=4, num_value_heads=24, key_dim=16, value_dim=16, kernel=4),
)


@pytest.mark.parametrize(
    ("spec", "settings", "sentence"),
    [
        (SPEC, {"tensor_parallel_size": 2}, "tp=2 does not divide 9 query heads.*fix: use tp=1"),
        (replace(SPEC, num_kv_heads=9, num_heads=72), {"tensor_parallel_size": 2}, "tp=2 does not divide 9 key/value heads"),
        (replace(SPEC, num_heads=10, num_kv_heads=10), {"tensor_parallel_size": 5}, "tp=5 does not divide 1536 columns"),
        (SPEC, {"tensor_parallel_size": 3, "expert_parallel_size": 3}, "ep=3 and moe_dp=1 for a checkpoint without experts"),
        (MOE, {"tensor_parallel_size": 8, "expert_parallel_size": 8}, "ep=8 does not divide 12 experts.*fix: use ep=6"),
        (replace(MOE, moe_intermediate=90), {"tensor_parallel_size": 4}, "moe_tp=4 does not divide 90 columns of an expert"),
        (
            MOE,
            {"tensor_parallel_size": 2, "context_parallel_size": 4, "moe_data_parallel_size": 2},
            "moe_dp=2 with cp=4.*use moe_dp=1 or moe_dp=4",
        ),
        (MOE, {"tensor_parallel_size": 4, "expert_parallel_size": 3}, "ep=3 times moe_dp=1 does not divide the 4 ranks"),
        (
            replace(MOE, num_heads=8),
            {"tensor_parallel_size": 2, "context_parallel_size": 3, "expert_parallel_size": 2, "experts": "dispatched"},
            "groups of one size must nest",
        ),
        (SPEC, {"eplb": {}}, "ep=1 and moe_dp=1 and eplb for a checkpoint without experts.*leave out ep and moe_dp and eplb"),
        (
            MOE,
            {"tensor_parallel_size": 8, "expert_parallel_size": 8, "eplb": {"num_redundant_experts": 5}},
            "ep=8 does not divide 12 experts and 5 redundant ones.*use num_redundant_experts=12",
        ),
        (
            MOE,
            {"tensor_parallel_size": 2, "expert_parallel_size": 2, "eplb": {"num_redundant_experts": 14}},
            "num_redundant_experts=14 for 12 experts on ep=2 ranks.*use at most 12",
        ),
        (MOE, {"eplb": {"num_redundant_experts": 1}}, "num_redundant_experts=1 for 12 experts on ep=1 ranks.*use an ep above 1"),
        (MOE, {"eplb": {"dispatch": "static"}}, "dispatch=static with experts=gathered"),
        (HYBRID, {"tensor_parallel_size": 8}, "tp=8 does not divide 4 key heads of the delta rule.*fix: use tp=4"),
        (HYBRID, {"mtp": {"num_tokens": 2}}, "mtp asks for 2 drafts, and the checkpoint has no head"),
    ],
)
def test_what_a_checkpoint_cannot_be_spread_over_is_refused(spec, settings, sentence):
    with pytest.raises(Refusal, match=sentence):
        Plan.of(make_settings({"model": "/m", **settings}), spec)


def test_key_value_heads_are_copied_where_ranks_outnumber_them():
    assert Plan.of(make_settings({"model": "/m", "tensor_parallel_size": 8}), MOE).tp == 8


@pytest.mark.parametrize(("asked", "drafts", "words"), [(None, 3, "pp2 mtp3"), (0, 0, "pp2"), (1, 1, "pp2 mtp1")])
def test_a_head_drafts_unless_it_is_turned_off(asked: int | None, drafts: int, words: str):
    settings = make_settings({"model": "/m", "pipeline_parallel_size": 2, "mtp": {"num_tokens": asked}})
    plan = Plan.of(settings, make_spec(QWEN3_5_35B))
    assert (plan.mtp, str(plan)) == (drafts, words)


@pytest.mark.parametrize(
    ("eplb", "experts", "dispatch", "words"),
    [
        (None, "dispatched", "dynamic", "tp4 ep4 dispatched"),
        ({}, "gathered", "dynamic", "tp4 ep4 eplb"),
        ({"num_redundant_experts": 8}, "gathered", "dynamic", "tp4 ep4 eplb8"),
        ({"num_redundant_experts": 8}, "dispatched", "static", "tp4 ep4 dispatched eplb8 static"),
        ({"dispatch": "dynamic"}, "dispatched", "dynamic", "tp4 ep4 dispatched eplb"),
        ({"dispatch": "fake"}, "gathered", "fake", "tp4 ep4 eplb fake"),
        ({"dispatch": "skewed"}, "gathered", "skewed", "tp4 ep4 eplb skewed"),
    ],
)
def test_copies_are_chosen_as_rows_find_them_unless_settings_say(eplb: dict | None, experts: str, dispatch: str, words: str):
    values = {"model": "/m", "tensor_parallel_size": 4, "expert_parallel_size": 4, "experts": experts, "eplb": eplb}
    plan = Plan.of(make_settings(values), MOE)
    assert (plan.dispatch, str(plan), plan.eplb) == (dispatch, words, eplb is not None)


def test_expert_axes_divide_the_ranks_of_a_stage():
    assert Plan(layer_cut=(1,), tp=4, cp=2, ep=4).moe_tp == 2
    with pytest.raises(Refusal, match="does not divide the 4 ranks"):
        Plan(layer_cut=(1,), tp=4, ep=3)
    with pytest.raises(Refusal, match="moe_dp=4 with cp=2"):
        Plan(layer_cut=(1,), tp=4, cp=2, moe_dp=4)
    with pytest.raises(Refusal, match=r"num_redundant_experts=2 with eplb=False.*set eplb"):
        Plan(layer_cut=(1,), tp=4, ep=2, num_redundant_experts=2)
    with pytest.raises(Refusal, match="below one"):
        Plan(layer_cut=(1,), tp=0)


def test_a_plan_is_a_value():
    plan = Plan(layer_cut=(2, 3), tp=2)
    assert plan == Plan(layer_cut=(2, 3), tp=2) and hash(plan) != hash(replace(plan, sp=True))
