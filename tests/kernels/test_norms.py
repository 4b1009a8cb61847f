"""rms_norm, add_rms_norm and silu_mul against transformers' Llama, zero-centred and gated norms against its Qwen3.5, in the same
order of roundings."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

from trireme_kernels.choose import Choices

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(3)


def norm_of(hidden, dtype, draw, kind=LlamaRMSNorm):
    norm = kind(hidden, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(hidden, generator=draw).to(dtype)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_is_llamas(dtype, draw):
    x, norm = torch.randn(7, 96, generator=draw).to(dtype), norm_of(96, dtype, draw)
    found = Choices("cpu", dtype)("rms_norm")(x, norm.weight, 1e-5)
    torch.testing.assert_close(found, norm(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_add_rms_norm_norms_the_rounded_sum(dtype, draw):
    x, residual = torch.randn(2, 7, 96, generator=draw).to(dtype)
    choices, weight = Choices("cpu", dtype), torch.randn(96, generator=draw).to(dtype)
    before = residual.clone()
    normed, total = choices("add_rms_norm")(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, choices("rms_norm")(total, weight, 1e-5)), "as on a stage that receives the sum"
    assert torch.equal(residual, before), "inputs are left alone"


@pytest.mark.parametrize("dtype", TYPES)
def test_zero_centred_norm_is_qwen3_5s(dtype, draw):
    """Ones are added in float32, and the product is rounded once."""
    x, norm = torch.randn(7, 96, generator=draw).to(dtype), norm_of(96, dtype, draw, Qwen3_5RMSNorm)
    weight, choices = norm.weight.float() + 1, Choices("cpu", dtype)
    expected = norm(x)
    torch.testing.assert_close(choices("rms_norm")(x, weight, 1e-5), expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    normed, _ = choices("add_rms_norm")(x, torch.zeros_like(x), weight, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_gated_rms_norm_is_qwen3_5s(dtype, draw):
    x, gate = torch.randn(2, 7, 4, 96, generator=draw).to(dtype)
    norm = norm_of(96, dtype, draw, Qwen3_5RMSNormGated)
    found = Choices("cpu", dtype)("gated_rms_norm")(x, gate, norm.weight, 1e-5)
    torch.testing.assert_close(found, norm(x, gate), rtol=2e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_silu_mul_is_llamas(dtype, draw):
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)).to(dtype).requires_grad_(False)
    x = torch.randn(5, 16, generator=draw).to(dtype)
    gate_up = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), dim=-1)
    torch.testing.assert_close(mlp.down_proj(Choices("cpu", dtype)("silu_mul")(gate_up)), mlp(x))
