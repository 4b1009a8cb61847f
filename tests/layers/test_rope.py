"""Rotary tables against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trireme.layers.rope import cos_sin
from trireme.models.spec import make_spec

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        YARN,
        {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 0.7},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    ],
    ids=lambda scaling: "-".join(map(str, scaling.values())),
)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("version", [4, 5])
def test_cos_sin_is_transformers(scaling: dict, theta: float, version: int):
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 8,
        "max_position_embeddings": 256,
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters={**scaling, "rope_theta": theta}))
    cos, sin = theirs(torch.zeros(1), torch.arange(256)[None])

    config = {"architectures": ["LlamaForCausalLM"], **sizes}
    if version == 5:
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        old = dict(scaling)
        config |= {"rope_theta": theta, "rope_scaling": {"type": old.pop("rope_type"), **old}}
    spec = make_spec(config)
    ours = cos_sin(spec.rope, spec.head_dim, 256)
    assert ours.dtype == torch.float32 and ours.shape == (256, 64)
    torch.testing.assert_close(ours, torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=1), atol=2e-5, rtol=0)
