"""Experts in any slots, with copies, and moved between steps: logits stay transformers', and each routed row is counted once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chained import Chained, Maps, build_decoder, move_experts
from parallel.test_placement import random_map
from tiny import oracle, prompt_logits, random_prompts, tiny_checkpoint
from trireme.core.step import Regime
from trireme.parallel.placement import fingerprint
from trireme.parallel.plan import Plan
from trireme.weights.load import fill_dummy

EXPERTS, TOP_K = 8, 3
PLANS = [
    Plan(layer_cut=(5,), eplb=True),
    Plan(layer_cut=(5,), tp=2, ep=2, eplb=True),
    Plan(layer_cut=(5,), tp=2, ep=2, eplb=True, num_redundant_experts=4),
    Plan(layer_cut=(3, 2), tp=2, ep=2, sp=True, eplb=True, num_redundant_experts=8, experts="dispatched"),
    Plan(layer_cut=(5,), tp=4, ep=4, sp=True, eplb=True, num_redundant_experts=4),
    Plan(layer_cut=(5,), tp=4, ep=4, eplb=True, num_redundant_experts=24, experts="dispatched", dispatch="static"),
    Plan(layer_cut=(5,), tp=4, ep=2, eplb=True, num_redundant_experts=2),
    Plan(layer_cut=(2, 3), tp=4, ep=2, sp=True, eplb=True, num_redundant_experts=2, experts="dispatched", dispatch="static"),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, eplb=True, num_redundant_experts=4),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, sp=True, eplb=True, num_redundant_experts=4, experts="dispatched", dispatch="static"),
]
FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_5_moe")
SIZES: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        heads: dict[str, Any] = {"linear_num_key_heads": 4, "linear_num_value_heads": 8} if family == "qwen3_5_moe" else {}
        tiny_checkpoint(directory / family, family, **SIZES, **heads)
    return directory


def num_sparse(family: str, layers: range) -> int:
    sparse = {"qwen2_moe": (1, 3), "qwen3_moe": (0, 2, 3, 4), "qwen3_5_moe": range(5)}[family]
    return sum(layer in sparse for layer in layers)


def random_maps(family: str, plan: Plan, seed: int) -> list[Maps]:
    """Of each stage, one for every layer with experts, no two alike."""
    every = []
    for stage in range(plan.pp):
        numbers = range(num_sparse(family, plan.layers(stage)))
        every.append({n: random_map(EXPERTS, EXPERTS + plan.num_redundant_experts, 100 * seed + 10 * stage + n) for n in numbers})
    return every


@pytest.mark.parametrize(("family", "plan"), list(product(FAMILIES, PLANS)), ids=str)
def test_logits_are_transformers(family: str, plan: Plan, checkpoints: Path):
    """Trivial maps, others, and others again, with chunks of two prompts under each; in one stage after another, as maps change."""
    checkpoint = checkpoints / family
    prompts = random_prompts([45, 24])
    wanted = [prompt_logits(checkpoint, prompt) for prompt in prompts]
    for regime, first in product(plan.regimes, (None, random_maps(family, plan, 1))):
        chained = Chained(checkpoint, plan, maps=first)
        for version, ends in enumerate((([0, 20], [0, 9]), ([20, 39], [9, 21]), ([39, 40], [21, 22]), ([40, 45], [22, 24])), 1):
            new: dict[int, Sequence[int]] = {i: prompt[slice(*end)] for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True))}
            rows = torch.cat([logits[slice(*end)] for logits, end in zip(wanted, ends, strict=True)])
            found = chained.forward(new, regime=regime if version != 3 else Regime(sp=regime.sp))
            torch.testing.assert_close(found, rows, atol=1e-4, rtol=0)
            for stage, maps in enumerate(random_maps(family, plan, 1 + version)):
                move_experts(chained.decoders[stage], maps, version)


def test_rows_of_another_expert_are_seen(checkpoints: Path):
    """What the test above rests on: a map that is rewritten while its rows are not moved gives other logits."""
    prompt = random_prompts([20])[0]
    plan = Plan(layer_cut=(5,), tp=2, ep=2, eplb=True)
    chained = Chained(checkpoints / "qwen3_moe", plan)
    for decoder in chained.decoders[0]:
        decoder.mixtures[2].placement.rewrite(random_map(EXPERTS, EXPERTS, 5), 1)
    found = chained.forward({0: prompt})
    assert (found - prompt_logits(checkpoints / "qwen3_moe", prompt)).abs().max() > 1e-2


def loads_of(chained: Chained, stage: int) -> torch.Tensor:
    """int32 [layers with experts, E], of all ranks that count."""
    counted = [[each.loads for each in decoder.mixtures if each.loads is not None] for decoder in chained.decoders[stage]]
    return torch.stack([torch.stack(loads) for loads in counted if loads]).sum(0).int()


@pytest.mark.parametrize("plan", [*PLANS, Plan(layer_cut=(5,), tp=2, cp=2, moe_dp=2, ep=2, eplb=True, experts="dispatched")], ids=str)
def test_each_routed_row_is_counted_once(plan: Plan, checkpoints: Path):
    """As often as transformers' router chooses it, in every regime, whatever the map and whoever has the rows."""
    family, prompts = "qwen3_moe", random_prompts([30, 7])
    with torch.inference_mode():
        logits = [oracle(checkpoints / family)(torch.tensor([each]), output_router_logits=True).router_logits for each in prompts]
    chosen = [torch.cat([each.topk(TOP_K).indices.flatten() for each in layer]) for layer in zip(*logits, strict=True)]
    wanted = torch.stack([each.bincount(minlength=EXPERTS) for each in chosen]).int()
    for times, regime in enumerate(plan.regimes):
        chained = Chained(checkpoints / family, plan, maps=random_maps(family, plan, times))
        for _ in range(2):
            chained.forward(dict(enumerate(prompts)), regime=regime)
            for sequence in range(2):
                chained.restart(sequence)
        assert torch.equal(torch.cat([loads_of(chained, stage) for stage in range(plan.pp)]), 2 * wanted)


def test_nothing_is_counted_without_eplb(checkpoints: Path):
    chained = Chained(checkpoints / "qwen3_moe", Plan(layer_cut=(5,), tp=2, ep=2))
    chained.forward({0: [5, 6, 7]})
    assert all(each.loads is None and each.picks is None for decoder in chained.decoders[0] for each in decoder.mixtures)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.ranks > 1], ids=str)
def test_ranks_that_see_the_same_rows_choose_alike(plan: Plan, checkpoints: Path):
    """By their fingerprints, which name the layer of a rank whose map is another."""
    chained = Chained(checkpoints / "qwen3_moe", plan)
    decoders = chained.decoders[-1]

    def disagreeing() -> set[int]:
        """Layers in which a rank chose otherwise than another of its group."""
        found = set()
        for rank, decoder in enumerate(decoders):
            for number, each in enumerate(decoder.mixtures):
                members = decoder.build.collectives.mesh.spans[each.strategy.owes].members(rank)
                picks = [decoders[member].mixtures[number].picks for member in members]
                found |= {number} if len({None if one is None else int(fingerprint(one)) for one in picks}) > 1 else set()
        return found

    for regime in plan.regimes:
        chained.forward({0: random_prompts([20])[0]}, regime=regime)
        assert not disagreeing()
        chained.restart(0)
    if decoders[0].mixtures[0].picks is not None:
        decoders[-1].mixtures[1].placement.rewrite(random_map(EXPERTS, EXPERTS + plan.num_redundant_experts, 9), 1)
        chained.forward({0: random_prompts([20])[0]})
        assert disagreeing() == {1}
    else:
        assert plan.experts == "dispatched" and plan.moe_tp == 1, "no two ranks see the same rows"


def test_dummy_copies_are_one_expert(checkpoints: Path):
    """Filled without a checkpoint, every copy is what the one rank without copies has."""
    plan, one = PLANS[4], build_decoder(checkpoints / "qwen3_moe", [5], 0)
    fill_dummy(one)
    maps = random_maps("qwen3_moe", plan, 3)[0]
    for rank in range(plan.ranks):
        decoder = build_decoder(checkpoints / "qwen3_moe", plan, 0, rank=rank, maps=maps)
        fill_dummy(decoder)
        for whole, own in zip(one.mixtures, decoder.mixtures, strict=True):
            assert torch.equal(own.gate_up, whole.gate_up[own.placement.here]) and torch.equal(own.down, whole.down[own.placement.here])


def test_a_head_that_drafts_has_a_map_and_counts_of_its_own(checkpoints: Path):
    plan = Plan(layer_cut=(3, 2), mtp=2, eplb=True, tp=2, ep=2)
    mapped = [{}, {2: np.arange(EXPERTS)[::-1].copy()}]
    chained = Chained(checkpoints / "qwen3_5_moe", plan, maps=mapped)
    first, last = (stage[0] for stage in chained.decoders)
    assert (len(first.mixtures), len(last.mixtures)) == (3, 3)
    assert last.mtp is not None and last.mixtures[-1] is last.mtp.mlp
    assert [each.placement.here.tolist() for each in last.mixtures] == [[0, 1, 2, 3], [0, 1, 2, 3], [7, 6, 5, 4]]
    chained.forward({0: [5, 6, 7]})
    assert loads_of(chained, 1).sum(1).tolist() == [3 * TOP_K, 3 * TOP_K, 0]
