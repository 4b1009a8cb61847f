"""The cost model: bytes that equal what every rank of a plan allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.test_plan import SPEC
from real_configs import QWEN3_5_35B
from tiny import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, tiny_config
from trireme.core.settings import make_settings
from trireme.layers.block import Build, PerRequest, PerToken
from trireme.models.cost import (
    activation_bytes,
    held_bytes,
    kv_bytes_per_token,
    mailbox_bytes,
    rank_param_bytes,
    state_bytes,
)
from trireme.models.decoder import Decoder
from trireme.models.registry import build_stage
from trireme.models.spec import Spec, make_spec
from trireme.parallel.plan import Plan
from trireme_kernels.choose import Choices

# Six query heads and three of keys and values: tp 2 has no whole ones, tp 3 one each, tp 6 copies. 251 words are ragged under all.
DENSE = [
    {"layer_cut": (5,)},
    {"layer_cut": (2, 3)},
    {"layer_cut": (1, 3, 1)},
    {"layer_cut": (5,), "tp": 3},
    {"layer_cut": (5,), "tp": 6},
    {"layer_cut": (2, 3), "tp": 3, "sp": True},
    {"layer_cut": (4, 1), "tp": 6, "cp": 2},
    {"layer_cut": (5,), "cp": 4},
    {"layer_cut": (2, 2, 1), "tp": 3, "cp": 2},
    {"layer_cut": (1, 4), "cp": 2, "sp": True},
]
MIXED = [
    {"layer_cut": (5,), "tp": 3, "ep": 1, "moe_dp": 1},
    {"layer_cut": (5,), "cp": 2, "ep": 2},
    {"layer_cut": (5,), "cp": 2, "ep": 2, "experts": "dispatched"},
    {"layer_cut": (2, 3), "cp": 4, "ep": 4},
    {"layer_cut": (2, 3), "cp": 4, "ep": 2},
    {"layer_cut": (2, 3), "cp": 4, "ep": 2, "experts": "dispatched"},
    {"layer_cut": (5,), "cp": 2, "moe_dp": 2},
    {"layer_cut": (1, 4), "tp": 6, "cp": 4, "ep": 4},
    {"layer_cut": (1, 4), "tp": 6, "cp": 4, "ep": 4, "experts": "dispatched"},
    {"layer_cut": (5,), "tp": 6, "cp": 2, "moe_dp": 2, "ep": 2, "sp": True},
    {"layer_cut": (2, 1, 2), "tp": 3, "cp": 8, "ep": 8, "sp": True},
    {"layer_cut": (5,), "cp": 2, "ep": 2, "eplb": True},
    {"layer_cut": (2, 3), "cp": 4, "ep": 2, "eplb": True, "num_redundant_experts": 2},
    {"layer_cut": (1, 4), "tp": 6, "cp": 4, "ep": 4, "experts": "dispatched", "eplb": True, "num_redundant_experts": 12},
    {"layer_cut": (5,), "tp": 6, "cp": 2, "moe_dp": 2, "ep": 3, "sp": True, "eplb": True, "num_redundant_experts": 1},
]


def spec_of(family: str, **overrides: Any) -> Spec:
    return make_spec(tiny_config(family, **overrides).to_dict())


def empty_stage(spec: Spec, plan: Plan, stage: int, rank: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Described, not allocated."""
    device = torch.device("meta")
    return build_stage(Build(spec, plan, stage, device, dtype, Choices("cpu", dtype), rank=rank))


def check_bytes(spec: Spec, plan: Plan, dtype: torch.dtype = torch.float32) -> None:
    for stage in range(plan.pp):
        for rank in range(plan.ranks):
            decoder, sizes = empty_stage(spec, plan, stage, rank, dtype), (spec, plan, stage)
            allocated = sum(param.nbytes for _, param in decoder.params())
            assert allocated == rank_param_bytes(*sizes, rank, dtype.itemsize), f"{plan}, stage {stage}, rank {rank}"
            pages = [keeps.bytes_per_page // 16 for keeps in decoder.keeps if isinstance(keeps, PerToken)]
            states = [keeps for keeps in decoder.keeps if isinstance(keeps, PerRequest)]
            assert sum(pages) == kv_bytes_per_token(*sizes, dtype.itemsize)
            assert sum(keeps.bytes_per_state for keeps in states) == state_bytes(*sizes, dtype.itemsize)
            held = sum(keeps.bytes_held(1 + plan.mtp) for keeps in states) if plan.mtp else 0
            assert held == held_bytes(*sizes, dtype.itemsize)


@pytest.mark.parametrize("plan", DENSE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_dense_ranks_hold_the_bytes_that_the_model_says(family: str, tied: bool, plan: dict):
    biases = {"attention_bias": True} if family != "qwen2" else {}
    check_bytes(spec_of(family, tie_word_embeddings=tied, intermediate_size=90, **biases), Plan(**plan))


@pytest.mark.parametrize("plan", DENSE + MIXED, ids=str)
@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("shared", [36, 35])
def test_ranks_with_experts_hold_the_bytes_that_the_model_says(family: str, shared: int, plan: dict):
    """A shared expert whose columns do not divide is whole on every rank."""
    sizes = {"intermediate_size": 90, "moe_intermediate_size": 24}
    more = {"shared_expert_intermediate_size": shared} if family == "qwen2_moe" else {}
    check_bytes(spec_of(family, **sizes, **more), Plan(**plan))


@pytest.mark.parametrize("plan", DENSE + MIXED, ids=str)
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_hybrid_ranks_hold_the_bytes_that_the_model_says(family: str, tied: bool, dtype: torch.dtype, plan: dict):
    """In bfloat16 some of them are float32. Of (1, 3, 1) layers the first stage has no attention, and the last no delta rule."""
    if family == "qwen3_5" and plan in MIXED:
        pytest.skip("it is dense")
    sizes = {"intermediate_size": 90, "moe_intermediate_size": 24, "linear_num_key_heads": 6, "linear_num_value_heads": 12}
    spec = spec_of(family, tie_word_embeddings=tied, **sizes)
    assert [spec.linear[layer] for layer in (0, 4)] == [True, False]
    for mtp in (0, 3):
        check_bytes(spec, Plan(**plan, mtp=mtp), dtype)


def test_each_of_two_stages_has_half_of_35b():
    """Issue 6: at most 35.5e9 bytes of weights on each of two GPUs, and 37.5e9 with the head that drafts."""
    spec = make_spec(QWEN3_5_35B)
    for num_seqs, rows in ((1, 512), (64, 512), (256, 8192), (512, 8192)):
        for mtp, most, wanted in ((0, 35.5e9, [34_660_779_520, 34_660_787_712]), (3, 37.5e9, [36_346_189_824, 35_681_799_168])):
            sizes = {"max_num_seqs": num_seqs, "max_num_batched_tokens": rows, "mtp": {"num_tokens": mtp}}
            plan = Plan.of(make_settings({"model": "/m", "pipeline_parallel_size": 2, **sizes}), spec)
            held = [rank_param_bytes(spec, plan, stage, 0, 2) for stage in range(2)]
            assert held == wanted and max(held) <= most
            assert sum(state_bytes(spec, plan, stage, 2) for stage in range(2)) == 30 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)


@pytest.mark.parametrize(("rows", "strip_rows"), [(8192, 8192), (8192, 4096), (300, 8192), (16384, 0)])
@pytest.mark.parametrize("tp", [2, 3])
def test_memory_for_mail_is_what_ranks_allocate(tp: int, rows: int, strip_rows: int):
    sizes = {"tensor_parallel_size": tp, "sequence_parallel": "on", "max_num_batched_tokens": rows, "strip_rows": strip_rows}
    plan = Plan.of(make_settings({"model": "/m", **sizes}), spec := spec_of("qwen3", intermediate_size=90, num_key_value_heads=6))
    told = mailbox_bytes(spec, plan, 2)
    assert mailbox_bytes(spec, Plan.of(make_settings({"model": "/m", **sizes, "sequence_parallel": "off"}), spec), 2) == 0
    if not strip_rows:
        assert told == 0
        return
    build = Build(spec, plan, 0, torch.device("meta"), torch.bfloat16, Choices("cpu", torch.bfloat16), rank=1)
    mailbox = build.mailbox
    assert mailbox is not None and told == mailbox.memory.nbytes


def test_a_row_may_find_more_of_its_experts_on_a_rank_that_has_more_slots():
    """Of 8 experts on 8 ranks each has one; with 8 more slots two, and a row that has three can send two rows there."""
    spec = spec_of("qwen3_moe", hidden_size=8, moe_intermediate_size=200, intermediate_size=8)
    sizes = {"layer_cut": (5,), "cp": 8, "ep": 8}
    one, two = Plan(**sizes), Plan(**sizes, eplb=True, num_redundant_experts=8)
    grown = activation_bytes(spec, two, 64, 1, 2) - activation_bytes(spec, one, 64, 1, 2)
    assert grown == 2 * 64 * (2 * 8 + 3 * 200)


def test_activations_of_a_dense_layer():
    """SmolLM2-135M in bfloat16, 512 rows: the MLP is widest, in and out [512, 576] each, gate, up and product [512, 4608],
    beside the residual [512, 576] and a rotary table of [8192, 64] in float32."""
    rotary = 4 * 8192 * 64
    assert activation_bytes(SPEC, Plan(layer_cut=(30,)), 512, 1, 2) == rotary + 2 * 512 * (3 * 576 + 4608)
    assert activation_bytes(SPEC, Plan(layer_cut=(30,), tp=3), 512, 1, 2) == rotary + 2 * 512 * (3 * 576 + 1536)
    assert activation_bytes(SPEC, Plan(layer_cut=(30,), cp=2), 512, 1, 2) == rotary + 2 * 256 * (3 * 576 + 4608)
    sp = activation_bytes(SPEC, Plan(layer_cut=(30,), tp=3, sp=True), 512, 1, 2)
    assert sp == rotary + 2 * (171 * 576 + 512 * (2 * 576 + 1536))
