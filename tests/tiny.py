"""Tiny random checkpoints of every family, and transformers' answers to them: the oracle of the tests. Nothing here is ours to test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_moe": Qwen3_5MoeConfig,
    "qwen3_next": Qwen3NextConfig,
}
FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe")
HYBRID_FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")

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
# Two value heads a key head, no size a power of two, and 6 of a head's 20 numbers turn.
_HYBRID = {
    "head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.3}
_MROPE = {**_ROPE, "mrope_section": [1, 1, 1], "mrope_interleaved": True}
_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2, "out_hidden_size": 48}
_MORE: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 10},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 36, "decoder_sparse_step": 2},
    "qwen3_moe": {**_EXPERTS, "head_dim": 10, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_5": {**_HYBRID, "rope_parameters": _MROPE, "mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 36, "rope_parameters": _MROPE, "mtp_num_hidden_layers": 1},
    "qwen3_next": {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 36, "rope_parameters": _ROPE, "mlp_only_layers": [1]},
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Of a tiny checkpoint. Overrides are the config's own keys, such as tie_word_embeddings, or num_attention_heads=12 and
    num_key_value_heads=2 to cut by four. Those of a checkpoint that sees go to its text_config."""
    kind, task = _CONFIGS[family], "ForCausalLM"
    values = {**_SIZES, **_MORE.get(family, {}), **overrides}
    if family in HYBRID_FAMILIES:
        values.setdefault("layer_types", _layer_types(values["num_hidden_layers"]))
    if family in ("qwen3_5", "qwen3_5_moe"):
        task = "ForConditionalGeneration"
        tied = values.get("tie_word_embeddings", False)
        values = {"text_config": values, "vision_config": _VISION, "tie_word_embeddings": tied}
    return kind(**{"architectures": [kind.__name__.replace("Config", task)], **values})


def _layer_types(num_layers: int) -> list[str]:
    """Full attention last, and in every other layer from the third on: in some stage of many each kind stands alone."""
    full = [layer == num_layers - 1 or (layer > 0 and layer % 2 == 0) for layer in range(num_layers)]
    return ["full_attention" if each else "linear_attention" for each in full]


def tiny_checkpoint(directory: Path | str, family: str, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A float32 checkpoint of random weights in `directory`: config.json, safetensors, generation_config.json. Overrides are
    those of tiny_config. Biases and norms are random too, so that a test sees each. A hybrid one has a head that drafts
    (mtp.*), without mtp_num_hidden_layers=0."""
    config = tiny_config(family, **overrides)
    noise = torch.Generator().manual_seed(seed)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch_alone():
        model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(_random(name, param, noise, hybrid=family in HYBRID_FAMILIES))
    text = config.get_text_config()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=text.eos_token_id)
    directory = Path(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if family in HYBRID_FAMILIES and getattr(text, "mtp_num_hidden_layers", 1):
        _add_head(directory, text, noise)
    return directory


def _random(name: str, like: torch.Tensor, noise: torch.Generator, *, hybrid: bool) -> torch.Tensor:
    drawn = torch.randn(like.shape, generator=noise)
    if name.endswith("A_log"):
        return drawn - 3.0  # states that remember for tens of rows
    if name.endswith("norm.weight") or "pre_fc_norm" in name:
        zero_centred = hybrid and not name.endswith("linear_attn.norm.weight")
        return 0.2 * drawn if zero_centred else 1.0 + 0.2 * drawn
    return 0.15 * drawn  # wide enough that the best logits lie apart and every layer matters


def _add_head(directory: Path, config: PreTrainedConfig, noise: torch.Generator) -> None:
    """Tensors that transformers has no module for, of the shapes of the last layer, which has full attention."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    hidden, last = config.hidden_size, f"layers.{config.num_hidden_layers - 1}."
    shapes = {name.partition(last)[2]: tensor.shape for name, tensor in tensors.items() if f".{last}" in name and "visual" not in name}
    shapes = {f"layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {f"{norm}.weight": torch.Size([hidden]) for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    shapes["fc.weight"] = torch.Size([hidden, 2 * hidden])
    for name in sorted(shapes):
        tensors[f"mtp.{name}"] = _random(f"mtp.{name}", torch.empty(shapes[name]), noise, hybrid=True)
    save_file(tensors, path, metadata={"format": "pt"})


def without_vision(directory: Path) -> Path:
    """Rewrites a checkpoint that sees into one of its text alone, as text-only fine-tunes are published."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    architectures = [each.replace("ForConditionalGeneration", "ForCausalLM") for each in config["architectures"]]
    path.write_text(json.dumps({**config["text_config"], "architectures": architectures}))
    path = directory / "model.safetensors"
    tensors = {name.replace("model.language_model.", "model."): tensor for name, tensor in load_file(path).items() if "visual" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
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
    with torch_alone():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Models of transformers that are imported meanwhile compute by PyTorch alone: kernels of packages that a GPU host has do not
    compute on its CPU."""
    hidden = {name: sys.modules.get(name) for name in ("fla", "causal_conv1d")}
    sys.modules.update(dict.fromkeys(hidden))  # None: cannot be imported
    try:
        yield
    finally:
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


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
