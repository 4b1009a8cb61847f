"""Tiny random checkpoints of every family, and transformers' answers to them: the oracle of the tests. Nothing here is ours to test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe")

# Odd on purpose: groups of two heads, sizes that no block of 16 divides.
_SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 88,
    "vocab_size": 251,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Eight experts of a width that no block divides; both ways in which a layer among them is dense.
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_MORE: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 10},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 36, "decoder_sparse_step": 2},
    "qwen3_moe": {**_EXPERTS, "head_dim": 10, "norm_topk_prob": True, "mlp_only_layers": [1]},
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Of a tiny checkpoint. Overrides are the config's own keys, such as tie_word_embeddings, or num_attention_heads=12 and
    num_key_value_heads=2 to cut by four."""
    kind = _CONFIGS[family]
    architecture = kind.__name__.replace("Config", "ForCausalLM")
    return kind(**{"architectures": [architecture], **_SIZES, **_MORE.get(family, {}), **overrides})


def tiny_checkpoint(directory: Path | str, family: str, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A float32 checkpoint of random weights in `directory`: config.json, safetensors, generation_config.json. Overrides are
    those of tiny_config. Biases and norms are random too, so that a test sees each."""
    config = tiny_config(family, **overrides)
    noise = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("norm.weight"):
                param.copy_(1.0 + 0.2 * torch.randn(param.shape, generator=noise))
            else:
                # Wide enough that the best logits lie apart and every layer matters.
                param.copy_(0.15 * torch.randn(param.shape, generator=noise))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=config.eos_token_id)
    directory = Path(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def fuse_experts(directory: Path) -> Path:
    """Rewrites a checkpoint with a tensor for each expert into one with a tensor for all, as transformers holds them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for prefix in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        experts = range(sum(name.startswith(f"{prefix}.experts.") for name in tensors) // 3)
        stacked = {
            part: torch.stack([tensors.pop(f"{prefix}.experts.{expert}.{part}_proj.weight") for expert in experts])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat((stacked["gate"], stacked["up"]), dim=1)
        tensors[f"{prefix}.experts.down_proj"] = stacked["down"]
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def oracle(directory: Path | str) -> PreTrainedModel:
    """The checkpoint in transformers, float32 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def prompt_logits(directory: Path | str, prompt: Sequence[int]) -> torch.Tensor:
    """float32 [len(prompt), V] by transformers."""
    return oracle(directory)(torch.tensor([list(prompt)])).logits[0]


@torch.inference_mode()
def greedy_tokens(directory: Path | str, prompts: Sequence[Sequence[int]], max_tokens: int, *, ignore_eos: bool = True) -> list[list[int]]:
    """The most likely continuation of each prompt alone, by transformers: one prompt in a forward, then token by token.
    Without ignore_eos a continuation ends before the checkpoint's end-of-sequence token."""
    model = oracle(directory)
    ends = model.generation_config.eos_token_id
    ends = set() if ignore_eos else {ends} if isinstance(ends, int) else set(ends or ())
    answers = []
    for prompt in prompts:
        answer: list[int] = []
        output = model(torch.tensor([list(prompt)]), use_cache=True)
        while len(answer) < max_tokens:
            token = int(output.logits[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        answers.append(answer)
    return answers


def random_prompts(lengths: Sequence[int], vocab_size: int = 251, seed: int = 1) -> list[list[int]]:
    """Prompts of these lengths, without the special tokens 0-2."""
    noise = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=noise).tolist() for length in lengths]
