"""Decoders spread over the ranks of a plan, every rank a thread, against transformers: in each regime, chunk by chunk."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from chained import Chained
from tiny import FAMILIES, MOE_FAMILIES, prompt_logits, random_prompts, tiny_checkpoint
from trireme.core.step import Regime
from trireme.parallel.plan import Plan

DENSE = [
    Plan(layer_cut=(5,), tp=2),
    Plan(layer_cut=(3, 2), tp=4, sp=True),
    Plan(layer_cut=(5,), cp=2),
    Plan(layer_cut=(2, 3), tp=2, cp=2, sp=True, whole_edges=True),
]
MIXED = [
    Plan(layer_cut=(5,), tp=4, ep=2, sp=True),
    Plan(layer_cut=(3, 2), tp=2, cp=2, ep=4),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2),
    Plan(layer_cut=(5,), tp=4, ep=4, sp=True, experts="dispatched"),
    Plan(layer_cut=(3, 2), tp=2, cp=2, ep=2, experts="dispatched"),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, sp=True, experts="dispatched"),
]
CASES = [*product(FAMILIES, DENSE), *product(MOE_FAMILIES, DENSE + MIXED)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for family in (*FAMILIES, *MOE_FAMILIES):
        tiny_checkpoint(directory / family, family, num_attention_heads=12, num_key_value_heads=2)
    return directory


@pytest.mark.parametrize(("family", "plan"), CASES, ids=str)
def test_logits_are_transformers(family: str, plan: Plan, checkpoints: Path):
    checkpoint = checkpoints / family
    first, second = random_prompts([37, 22])
    wanted = torch.cat([prompt_logits(checkpoint, first[:30]), prompt_logits(checkpoint, second)])
    later = prompt_logits(checkpoint, first)[30:]
    for regime in plan.regimes:
        chained = Chained(checkpoint, plan)
        torch.testing.assert_close(chained.forward({0: first[:30], 1: second}, regime=regime), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(chained.forward({0: first[30:]}, regime=Regime(sp=regime.sp)), later, atol=1e-4, rtol=0)
