"""route against transformers' MoE routers, and what those leave open: the order of equal weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from trireme_kernels.case import Case
from trireme_kernels.choose import build, misfit


def implementation(name):
    """Built for where it can run here; takes and gives tensors of the CPU."""
    case = Case("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    if (reason := misfit("route", name, case, forced=True)) is not None:
        pytest.skip(reason)
    op = build("route", name, case)
    return lambda logits, *choice: tuple(found.cpu() for found in op(logits.to(case.device), *choice))


@pytest.mark.parametrize("name", ["reference", "tl"])
@pytest.mark.parametrize("router", [Qwen2MoeTopKRouter, Qwen3MoeTopKRouter])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(60, 4), (128, 8), (6, 6)])
def test_is_transformers(name, router, renormalise, num_experts, top_k):
    config = SimpleNamespace(num_experts=num_experts, num_experts_per_tok=top_k, norm_topk_prob=renormalise, hidden_size=num_experts)
    theirs = router(config).requires_grad_(False)
    theirs.weight.data = torch.eye(num_experts)
    logits = torch.randn(50, num_experts, generator=torch.Generator().manual_seed(0)) * 2
    _, expected, expected_ids = theirs(logits)
    weights, ids = implementation(name)(logits, top_k, renormalise)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["reference", "tl"])
def test_equals_go_to_the_lower_id(name):
    """Logits of few values, so that every choice is among equals: a stable sort of the logits is the oracle."""
    logits = torch.randint(-2, 3, (40, 96), generator=torch.Generator().manual_seed(1)).float()
    logits[0], logits[1, ::2] = 0.0, -0.0
    weights, ids = implementation(name)(logits, 10, False)
    assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :10])
    torch.testing.assert_close(weights, logits.softmax(dim=-1).gather(1, ids), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of numpy
@pytest.mark.parametrize("name", ["reference", "tl"])
def test_ids_are_always_experts(name):
    """Logits that overflowed must not lead to memory of no expert, nor weights that vanish to one expert twice."""
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    logits[0], logits[1, 3], logits[2, 5], logits[3, 7] = torch.nan, torch.inf, -torch.inf, 500.0
    ids = implementation(name)(logits, 20, True)[1]
    assert torch.equal(ids.sort(dim=-1).values, torch.arange(20).expand(4, -1))
    assert ids[3].tolist() == [7, *(expert for expert in range(20) if expert != 7)]


def test_many_experts_are_refused_by_the_kernel():
    pytest.importorskip("triton")
    assert misfit("route", "tl", Case("cuda", torch.float32, {"num_experts": 2048})) == "num_experts=2048 is over 1024"
