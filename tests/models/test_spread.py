"""Decoders spread over the ranks of a plan, every rank a thread, against transformers: in each regime, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from chained import Chained
from tiny import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, prompt_logits, random_prompts, tiny_checkpoint
from trireme.core.step import Regime
from trireme.layers import linear
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Addend

DENSE = [
    Plan(layer_cut=(5,), tp=2),
    Plan(layer_cut=(3, 2), tp=4, sp=True),
    Plan(layer_cut=(5,), cp=2),
    Plan(layer_cut=(2, 3), tp=2, cp=2, sp=True, whole_edges=True),
    Plan(layer_cut=(3, 2), tp=2, sp=True, strip_rows=29),
    Plan(layer_cut=(5,), tp=4, sp=True, whole_edges=True, strip_rows=20),
]
MIXED = [
    Plan(layer_cut=(5,), tp=4, ep=2, sp=True),
    Plan(layer_cut=(3, 2), tp=2, cp=2, ep=4),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2),
    Plan(layer_cut=(5,), tp=4, ep=4, sp=True, experts="dispatched"),
    Plan(layer_cut=(3, 2), tp=2, cp=2, ep=2, experts="dispatched"),
    Plan(layer_cut=(5,), tp=2, cp=2, ep=2, moe_dp=2, sp=True, experts="dispatched"),
    Plan(layer_cut=(3, 2), tp=4, ep=2, sp=True, strip_rows=20),
    Plan(layer_cut=(5,), tp=4, ep=2, sp=True, experts="dispatched", strip_rows=20),
]
HYBRID = [
    Plan(layer_cut=(5,), tp=2),
    Plan(layer_cut=(2, 1, 1, 1), tp=2, sp=True),
    Plan(layer_cut=(3, 2), tp=4, sp=True),
    Plan(layer_cut=(5,), cp=2),
    Plan(layer_cut=(1, 4), cp=4),
    Plan(layer_cut=(1, 3, 1), tp=2, cp=2, sp=True, whole_edges=True),
    Plan(layer_cut=(2, 3), tp=4, sp=True, strip_rows=29),
]
HYBRID_MIXED = [
    Plan(layer_cut=(5,), cp=2, ep=2),
    Plan(layer_cut=(3, 2), tp=2, cp=2, ep=4, sp=True),
    Plan(layer_cut=(5,), tp=2, ep=2),
    Plan(layer_cut=(5,), tp=4, ep=4),
    Plan(layer_cut=(2, 3), tp=2, ep=2, sp=True, experts="dispatched"),
    Plan(layer_cut=(5,), tp=2, ep=2, sp=True, experts="dispatched", strip_rows=29),
]
CASES = [
    *product(FAMILIES, DENSE),
    *product(MOE_FAMILIES, DENSE + MIXED),
    *product(HYBRID_FAMILIES, HYBRID),
    *product(HYBRID_FAMILIES[1:], HYBRID_MIXED),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for family in (*FAMILIES, *MOE_FAMILIES):
        tiny_checkpoint(directory / family, family, num_attention_heads=12, num_key_value_heads=2)
    heads: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
    for family in HYBRID_FAMILIES:
        tiny_checkpoint(directory / family, family, **heads)
    return directory


@pytest.mark.parametrize(("family", "plan"), CASES, ids=str)
def test_logits_are_transformers(family: str, plan: Plan, checkpoints: Path):
    """Two prompts in chunks, one of fewer rows than there are parts to cut it into, then rows that are not cut."""
    checkpoint = checkpoints / family
    prompts = random_prompts([45, 24])
    wanted = [prompt_logits(checkpoint, prompt) for prompt in prompts]
    for regime in plan.regimes:
        chained = Chained(checkpoint, plan)
        for ends, each in (([0, 30], [0, 19]), regime), (([30, 39], [19, 21]), regime), (([39, 45], [21, 24]), Regime(sp=regime.sp)):
            new: dict[int, Sequence[int]] = {i: prompt[slice(*end)] for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True))}
            rows = torch.cat([logits[slice(*end)] for logits, end in zip(wanted, ends, strict=True)])
            torch.testing.assert_close(chained.forward(new, regime=each), rows, atol=1e-4, rtol=0)


LATE = [Plan(layer_cut=(5,)), Plan(layer_cut=(3, 2)), Plan(layer_cut=(3, 2), tp=2, sp=True, strip_rows=29), Plan(layer_cut=(5,), cp=2)]


@pytest.mark.parametrize(("family", "plan"), [*product(("qwen3", "qwen3_5"), LATE)], ids=str)
def test_last_products_of_many_rows_add_to_the_residual(family: str, plan: Plan, checkpoints: Path, monkeypatch):
    """The same where a few rows are many and weights are not packed: transformers' logits; what ranks exchange is not added before."""
    added = []
    monkeypatch.setattr(linear, "_MANY", 5)
    monkeypatch.setattr(linear.Linear, "prepare", lambda self: None)
    monkeypatch.setattr(Addend, "added_to", lambda self, residual: added.append(self) or residual.addmm_(self.rows, self.columns))
    test_logits_are_transformers(family, plan, checkpoints)
    assert (len(added) > 0) == (plan.tp == 1)


@pytest.mark.parametrize(("family", "plan"), CASES, ids=str)
def test_rows_that_nobody_asks_for_stop_in_the_last_layer(family: str, plan: Plan, checkpoints: Path):
    """The same, and nothing is asked of the first chunks; then the last row of one, then rows amid the other, as logprobs of
    a prompt are; of each of the last ones a row."""
    prompts = random_prompts([45, 24])
    wanted = torch.cat([prompt_logits(checkpoints / family, prompt) for prompt in prompts])
    for regime in plan.regimes:
        chained, seen = Chained(checkpoints / family, plan), []
        for decoder in chained.decoders[-1]:
            decoder.blocks[-2].register_forward_pre_hook(lambda _, given: seen.append(sum(given[0].sizes)))  # noqa: B023
        for ends, each, asked, rows, alone in (
            (([0, 16], [0, 10]), regime, [], [], True),
            (([16, 30], [10, 19]), regime, [], [], False),
            (([30, 37], [19, 21]), regime, [8, 0, 1, 2, 4], [45 + 20, 30, 31, 32, 34], True),
            (([37, 42], [21, 22]), regime, [5, 1, 2], [45 + 21, 38, 39], False),
            (([42, 45], [22, 24]), Regime(sp=regime.sp), [2, 4], [44, 45 + 23], False),
        ):
            new: dict[int, Sequence[int]] = {i: prompt[slice(*end)] for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True))}
            logits = chained.forward(new, head_rows=asked, alone=alone, regime=each)
            torch.testing.assert_close(logits, wanted[rows], atol=1e-4, rtol=0)
            assert max(seen, default=0) <= len(asked) <= sum(seen) and len(seen) == (plan.ranks if asked else 0)
            seen.clear()
