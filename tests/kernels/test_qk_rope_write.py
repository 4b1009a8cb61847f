"""qk_rope_write against transformers' Llama rotation and Qwen3 head norms, and those of Qwen3.5, that turns part of a head; pools of
any strides get exactly the written rows."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb as apply_partial_rotary

from trireme_kernels.choose import Choices

HQ, HK, D, ROWS, PAGES = 9, 3, 64, 23, 5


@pytest.fixture
def rotary():
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=HQ * D, num_attention_heads=HQ, num_key_value_heads=HK, max_position_embeddings=512)
    )


def table(rotary):
    """[512, D]: cosines of the frequencies, then sines."""
    cos, sin = rotary(torch.zeros(1), torch.arange(512)[None])
    return torch.cat((cos[0, :, : D // 2], sin[0, :, : D // 2]), dim=-1)


def pools(layout):
    """[PAGES, HK, 16, D] over storage with the named dims, outermost first."""
    shape = {"pages": PAGES, "heads": HK, "tokens": 16}
    order = [layout.index(name) for name in ("pages", "heads", "tokens")]
    return [torch.full([*(shape[name] for name in layout), D], 7.0).permute(*order, 3) for _ in "kv"]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("layout", [("heads", "pages", "tokens"), ("pages", "heads", "tokens"), ("pages", "tokens", "heads")])
def test_is_transformers(rotary, layout, normed):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(ROWS, HQ + 2 * HK, D, generator=draw).split((HQ, HK, HK), dim=1)
    positions = torch.randint(0, 512, (ROWS,), generator=draw)
    pages = torch.randperm(PAGES * 16, generator=draw)[:ROWS]
    k_pool, v_pool = pools(layout)
    norms = [Qwen3RMSNorm(D, eps=1e-6).requires_grad_(False) for _ in "qk"]
    for norm in norms:
        norm.weight.data = torch.randn(D, generator=draw)
    weights = [norm.weight if normed else None for norm in norms]
    run = Choices("cpu", torch.float32)("qk_rope_write", num_heads=HQ, num_kv_heads=HK, head_dim=D)
    found = run(q, k, v, table(rotary), positions, *weights, 1e-6, k_pool, v_pool, pages)

    if normed:
        q, k = norms[0](q), norms[1](k)
    cos, sin = rotary(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(found, expected_q[0].transpose(0, 1), atol=2e-6, rtol=2e-6)
    for pool, expected in ((k_pool, expected_k[0].transpose(0, 1)), (v_pool, v)):
        rows = pool.transpose(1, 2).reshape(PAGES * 16, HK, D)
        torch.testing.assert_close(rows[pages], expected, atol=2e-6, rtol=2e-6)
        untouched = torch.ones(PAGES * 16, dtype=torch.bool)
        untouched[pages] = False
        assert (rows[untouched] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_head_is_turned(dtype):
    """A quarter, as Qwen3.5 does; its head norms are zero-centred, so their weights come in float32 with ones added."""
    draw, turned = torch.Generator().manual_seed(0), D // 4
    q, k, v = torch.randn(ROWS, HQ + 2 * HK, D, generator=draw).to(dtype).split((HQ, HK, HK), dim=1)
    angles, positions = torch.rand(512, turned // 2, generator=draw) * 6.3, torch.randint(0, 512, (ROWS,), generator=draw)
    norms = [Qwen3_5RMSNorm(D, eps=1e-6).to(dtype).requires_grad_(False) for _ in "qk"]
    for norm in norms:
        norm.weight.data = torch.randn(D, generator=draw).to(dtype)
    k_pool, v_pool = (pool.to(dtype) for pool in pools(("heads", "pages", "tokens")))
    weights, table_of = [norm.weight.float() + 1 for norm in norms], torch.cat((angles.cos(), angles.sin()), dim=-1)
    run = Choices("cpu", dtype)("qk_rope_write", num_heads=HQ, num_kv_heads=HK, head_dim=D)
    found = run(q, k, v, table_of, positions, *weights, 1e-6, k_pool, v_pool, torch.arange(ROWS))

    cos, sin = (torch.cat((part, part), dim=-1)[positions] for part in (angles.cos(), angles.sin()))
    expected_q, expected_k = apply_partial_rotary(norms[0](q), norms[1](k), cos, sin)
    torch.testing.assert_close(found, expected_q.to(dtype), atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 1e-2)
    rows = k_pool.transpose(1, 2).reshape(PAGES * 16, HK, D)[:ROWS]
    torch.testing.assert_close(rows, expected_k.to(dtype), atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 1e-2)
