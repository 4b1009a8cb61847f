"""The experts of each token, as a request asks for them: those that transformers' routers choose for the same text, under any plan, in
chunks, after preemption, amid drafts, and beside requests that do not ask."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from drafted import draft_well
from plans.grid import settings_of, sizes_of
from plans.test_plans import make_prompts
from plans.whole import emissions_of
from tiny import oracle, tiny_checkpoint
from trireme.core.request import Emission, Request, Sampling
from trireme.core.settings import make_settings
from trireme_tools import offline

pytestmark = pytest.mark.ranks

TOP_K = 3
PROMPTS = make_prompts()
CASES = [
    ("qwen3_moe", "one few", {"max_num_batched_tokens": 32}),
    ("qwen3_moe", "pp4", {"layer_cut": [1, 1, 1, 1]}),  # one stage has no experts
    ("qwen3_moe", "tp2 ep2", {"eplb": {"num_redundant_experts": 2, "count_every": 3}}),
    ("qwen3_moe", "tp2 ep2 dispatched sp", {"num_pages": 17, "async_depth": 2}),
    ("qwen3_moe", "cp2 ep2", {"max_num_batched_tokens": 64}),
    ("qwen3_5_moe", "one mtp3", {"num_pages": 24, "max_num_batched_tokens": 48}),
    ("qwen3_5_moe", "pp2 tp2 ep2 sp dispatched mtp2", {"num_pages": 24}),
]
MORE = [  # `make test-plans` has them
    ("qwen3_moe", "one", {}),
    ("qwen3_moe", "pp2", {"max_num_batched_tokens": 48}),
    ("qwen3_moe", "pp2 tensor", {}),
    ("qwen3_moe", "tp2 ep2", {}),
    ("qwen3_moe", "tp2 ep2 dispatched", {}),
    ("qwen3_moe", "cp2 ep2 dispatched", {}),
    ("qwen3_moe", "pp2 tp2 cp2 moe_dp2 ep2 dispatched sp", {}),
    ("qwen3_moe", "tp2 cp2 moe_dp2", {}),
    ("qwen3_5_moe", "pp2", {}),
    ("qwen3_5_moe", "tp2 ep2 mtp3", {}),
    ("qwen3_5_moe", "cp2 ep2 mtp3", {"max_num_batched_tokens": 64}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("routed")
    folders = {family: tiny_checkpoint(root / family, family, **sizes_of(family, "")) for family in ("qwen3_moe", "qwen3_5_moe")}
    draft_well(folders["qwen3_5_moe"], sureness=0.9)
    return folders


@pytest.mark.parametrize(("family", "plan", "values"), [*CASES, *(pytest.param(*case, marks=pytest.mark.grid) for case in MORE)])
def test_experts_are_those_of_transformers(pool, checkpoints, family, plan, values):
    base = {"model": str(checkpoints[family]), "max_model_len": 256, "max_num_seqs": 8, "num_pages": 200, "threads_per_rank": 1}
    settings = make_settings({**base, "mtp": {"num_tokens": 0}, **settings_of(plan), **values})
    requests = [
        Request(
            id=str(i),
            prompt=prompt,
            sampling=Sampling(max_tokens=16 + i, temperature=0.0, n=1 + (i == 3), stop_token_ids=tuple(range(3, 40)) if i == 5 else ()),
            routed_experts=i % 3 != 2,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    with offline.running(settings, pool) as engine:
        for _ in range(2):  # the second time there are pages to reuse, for those who may
            answers = emissions_of(engine, requests)
            for request, answer in zip(requests, answers, strict=True):
                for index in range(request.sampling.n):
                    check(checkpoints[family], request, [emission for emission in answer if emission.index == index])
        stats = engine.stats
    assert stats.preemptions > 0 or not ("few" in plan or "num_pages" in values), "the pool is meant to be too small"
    assert stats.cached_tokens > 0 and (stats.cp_steps > 0) == ("cp" in plan) and (stats.sp_steps > 0) == ("sp" in plan.split())
    assert (stats.drafted_tokens > stats.accepted_tokens > 0) == ("mtp" in plan)


def check(folder: Path, request: Request, answer: list[Emission]) -> None:
    assert answer[-1].error is None, answer[-1].error
    told = [emission.routed_experts for emission in answer if emission.routed_experts is not None]
    if not request.routed_experts:
        assert not told
        return
    text = request.prompt + [token for emission in answer for token in emission.tokens]
    num_rows = len(text) - (answer[-1].finish_reason == "length")  # what a stop token follows was computed
    logits = routers_of(folder, tuple(text))[:num_rows]  # [rows, layers, E]
    rows = torch.from_numpy(np.concatenate(told)[:num_rows].astype(np.int64)).view(num_rows, -1, TOP_K)
    assert rows.shape[1] == logits.shape[1] and rows.min() >= 0 and all(len(set(row)) == TOP_K for row in rows.view(-1, TOP_K).tolist())
    torch.testing.assert_close(logits.gather(2, rows), logits.topk(TOP_K).values, rtol=0, atol=1e-4)  # heaviest first


@functools.cache  # any plan gives the same texts
@torch.inference_mode()
def routers_of(folder: Path, text: tuple[int, ...]) -> torch.Tensor:
    """What transformers' routers say of each token: logits [tokens, layers with experts, E]."""
    model, found = oracle(folder), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda gate, inputs, _: found.append(torch.nn.functional.linear(inputs[0], gate.weight)))
    model(torch.tensor([list(text)]))
    return torch.stack([logits.view(len(text), -1) for logits in found], dim=1)
