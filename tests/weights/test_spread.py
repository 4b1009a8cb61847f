"""Loading on every rank of a plan: each number of a checkpoint is read as often as the plan has copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chained import Chained, build_decoder
from parallel.test_placement import random_map
from tiny import fuse_experts, random_prompts, tiny_checkpoint
from trireme.core.maps import trivial_map
from trireme.core.refusal import Refusal
from trireme.models.decoder import Decoder
from trireme.parallel.plan import Plan
from trireme.weights.load import fill_dummy, load
from trireme.weights.names import sort
from trireme.weights.reader import Checkpoint
from weights.test_load import rewrite

SIZES: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2}
HYBRID_SIZES: dict[str, Any] = {**SIZES, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
PLANS = [
    Plan(layer_cut=(5,)),
    Plan(layer_cut=(5,), tp=2),
    Plan(layer_cut=(5,), tp=4, ep=4),
    Plan(layer_cut=(3, 2), tp=4, ep=2, sp=True),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=4),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2),
    Plan(layer_cut=(2, 3), tp=2, cp=2, moe_dp=2, experts="dispatched"),
    Plan(layer_cut=(5,), tp=4, ep=2, experts="dispatched"),
]


def ranks(directory: Path, plan: Plan) -> Iterator[Decoder]:
    for stage in range(plan.pp):
        for rank in range(plan.ranks):
            yield build_decoder(directory, plan, stage, rank=rank)


def copies(name: str, plan: Plan, shared_width: int) -> int:
    """How many ranks have each number of a tensor."""
    owing = plan.moe_tp if plan.experts == "dispatched" else plan.ep * plan.moe_tp
    if ".experts." in name:
        return plan.moe_dp
    if "shared_expert." in name:
        return plan.ranks // owing if shared_width % owing == 0 else plan.ranks
    if ".k_proj" in name or ".v_proj" in name:
        return plan.cp * max(1, plan.tp // SIZES["num_key_value_heads"])
    if any(word in name for word in ("_proj", "embed_tokens", "lm_head", "conv1d", "A_log", "dt_bias")):
        return plan.cp
    return plan.ranks  # norms, router, the shared expert's gate


FAMILIES = {
    "each": "qwen3_moe",
    "fused": "qwen3_moe",
    "shared": "qwen2_moe",
    "dense": "qwen2",
    "inside": "qwen3_5_moe",
    "interleaved": "qwen3_next",
}
FORMS = [
    *product(("each", "fused", "shared", "inside", "interleaved"), PLANS),
    *(("dense", plan) for plan in PLANS if plan.ep * plan.moe_dp == 1),
]


@pytest.mark.parametrize(("form", "plan"), FORMS, ids=str)
def test_every_number_is_read_as_often_as_the_plan_says(form: str, plan: Plan, tmp_path: Path):
    shared: dict[str, Any] = {"shared_expert_intermediate_size": 35} if form == "shared" and plan.ep > 2 else {}
    tiny_checkpoint(tmp_path, FAMILIES[form], **(HYBRID_SIZES if form in ("inside", "interleaved") else SIZES), **shared)
    if form in ("fused", "shared", "inside"):
        fuse_experts(tmp_path)
    read_bytes = 0
    with Checkpoint(tmp_path) as checkpoint:
        times = {name: torch.zeros(stored.shape) for name, stored in checkpoint.tensors.items()}
        for decoder in ranks(tmp_path, plan):
            params = dict(decoder.params())
            for use in sort(checkpoint.tensors, decoder, 5).uses:
                for piece in params[use.target].pieces(use.parts, use.expert, interleaved=use.interleaved):
                    times[use.tensor][piece.source] += 1
            manifest = load(decoder, tmp_path)
            assert manifest.param_bytes == manifest.read_bytes == sum(param.nbytes for param in params.values())
            read_bytes += manifest.read_bytes
    for name, each in times.items():
        passed = name.startswith(("model.visual.", "mtp."))
        assert bool((each == (0 if passed else copies(name, plan, shared.get("shared_expert_intermediate_size", 36)))).all()), name
    assert read_bytes == sum(4 * int(each.sum()) for each in times.values())


@pytest.mark.parametrize("form", ["each", "fused", "inside"])
@pytest.mark.parametrize("experts", ["gathered", "dispatched"])
def test_an_expert_is_read_for_each_of_its_slots(form: str, experts: Any, tmp_path: Path):
    """Also where two are on one rank; rows of all copies are the checkpoint's, and nothing else is read more than without copies."""
    plan = Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, eplb=True, num_redundant_experts=4, experts=experts)
    tiny_checkpoint(tmp_path, FAMILIES[form], **(HYBRID_SIZES if form == "inside" else SIZES))
    if form == "fused":
        fuse_experts(tmp_path)
    sparse = [0, 2, 3, 4] if FAMILIES[form] == "qwen3_moe" else [0, 1, 2, 3, 4]
    maps = {number: random_map(8, 12, number) for number in range(1, 4)}
    with Checkpoint(tmp_path) as checkpoint:
        times = {name: torch.zeros(stored.shape) for name, stored in checkpoint.tensors.items()}
        for rank in range(plan.ranks):
            decoder = build_decoder(tmp_path, plan, 0, rank=rank, maps=maps)
            params = dict(decoder.params())
            for use in sort(checkpoint.tensors, decoder, 5).uses:
                for piece in params[use.target].pieces(use.parts, use.expert, interleaved=use.interleaved):
                    times[use.tensor][piece.source] += 1
            manifest = load(decoder, tmp_path)
            assert manifest.param_bytes == manifest.read_bytes == sum(param.nbytes for param in params.values())
            for each in decoder.mixtures:
                prefix = each.name.replace("layers", "model.language_model.layers" if form == "inside" else "model.layers")
                assert torch.equal(each.down, _stacked(checkpoint, f"{prefix}.experts")[each.placement.here])
    for name, each in times.items():
        if ".experts." not in name:
            assert bool((each == (0 if name.startswith(("model.visual.", "mtp.")) else copies(name, plan, 36))).all()), name
            continue
        number = -1 if name.startswith("mtp.") else sparse.index(int(name.split("layers.")[1].split(".")[0]))
        slots = torch.from_numpy(np.bincount(maps.get(number, trivial_map(8, 12)))) * plan.moe_dp * (number >= 0)
        of_one = name.split(".experts.")[1].split(".")[0]
        wanted = slots[int(of_one)] if of_one.isdigit() else slots.view(8, 1, 1)
        assert bool((each == wanted).all()), name


def _stacked(checkpoint: Checkpoint, prefix: str) -> torch.Tensor:
    """All experts' last product."""
    if f"{prefix}.down_proj" in checkpoint.tensors:
        return checkpoint.read(f"{prefix}.down_proj")
    return torch.stack([checkpoint.read(f"{prefix}.{expert}.down_proj.weight") for expert in range(8)])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_dummy_weights_do_not_know_the_plan(plan: Plan, tmp_path: Path):
    """Each rank has its slices of what one rank has."""
    tiny_checkpoint(tmp_path, "qwen3_next", **HYBRID_SIZES)
    one = build_decoder(tmp_path, [5], 0)
    whole = dict(one.params())
    fill_dummy(one, seed=3)
    for decoder in ranks(tmp_path, plan):
        params = dict(decoder.params())
        fill_dummy(decoder, seed=3)
        for name, param in params.items():
            for part in range(param.num_parts):
                [alone] = whole[name].pieces((part,))
                [piece] = param.pieces((part,))
                assert torch.equal(param.data[piece.target], whole[name].data[alone.target][piece.source]), name


def test_both_forms_are_one_model(tmp_path: Path):
    prompt = random_prompts([12])[0]
    each = Chained(tiny_checkpoint(tmp_path, "qwen3_moe"), [2, 3]).forward({0: prompt})
    assert torch.equal(Chained(fuse_experts(tmp_path), [2, 3]).forward({0: prompt}), each)


def test_an_expert_beyond_the_models_is_refused_by_every_rank(tmp_path: Path):
    tiny_checkpoint(tmp_path, "qwen3_moe", **SIZES)
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name.format(8): tensors[name.format(7)].clone()}))
    for decoder in ranks(tmp_path, Plan(layer_cut=(5,), tp=2, ep=2)):
        with pytest.raises(Refusal, match=r"does not use: .*experts\.8\.down_proj"):
            load(decoder, tmp_path)


def test_a_missing_expert_is_missed_by_the_rank_that_has_it(tmp_path: Path):
    tiny_checkpoint(tmp_path, "qwen3_moe", **SIZES)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.experts.6.up_proj.weight"))
    first, second = ranks(tmp_path, Plan(layer_cut=(5,), tp=2, ep=2))
    load(first, tmp_path)
    with pytest.raises(Refusal, match=r"not at all, or in part: layers\.0\.mlp\.gate_up"):
        load(second, tmp_path)


def test_an_expert_in_both_forms_is_refused(tmp_path: Path):
    fuse_experts(tiny_checkpoint(tmp_path, "qwen3_moe"))
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.experts.6.down_proj.weight": torch.zeros(48, 20)}))
    with pytest.raises(Refusal, match=r"parameters twice: layers\.0\.mlp\.down"):
        load(build_decoder(tmp_path, [5], 0), tmp_path)
