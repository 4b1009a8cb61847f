"""A llama GGUF as a Hugging Face checkpoint: exact dequantised weights, config, tokenizer, chat template. No download, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trireme.core.refusal import Refusal

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_END_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # tokenizer.ggml.token_type of a special token


def convert(path: Path, output: Path, progress: Callable[[int, int], None]) -> None:
    """Writes model.safetensors (float32), config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
    chat_template.jinja into `output`. `progress` gets (tensors done, tensors in all). Refusal for another architecture."""
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kind = (meta["general.architecture"], meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise Refusal(
            f"{path.name} is {'/'.join(kind)}", why="only llama/gpt2/smollm files are converted here", fix="give a safetensors checkpoint"
        )
    tensors = {}
    for done, tensor in enumerate(reader.tensors, 1):
        name, values = _hf_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), meta)
        tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
        progress(done, len(reader.tensors))
    output.mkdir(parents=True, exist_ok=True)
    weights = output / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # written 0600: a server of another user must read it
    config = _config(meta, tied="lm_head.weight" not in tensors)
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    _tokenizer(meta).save(str(output / "tokenizer.json"))
    _write_json(output / "tokenizer_config.json", _tokenizer_config(meta))
    (output / "chat_template.jinja").write_text(meta["tokenizer.chat_template"])


def _hf_tensor(name: str, values: np.ndarray, meta: dict[str, Any]) -> tuple[str, np.ndarray]:
    """GGUF's `blk.3.attn_q.weight` under its Hugging Face name. GGUF keeps the two halves of a rotated pair side by
    side (x0 y0 x1 y1 ...), Hugging Face half by half (x0 x1 ... y0 y1 ...): query and key rows are put back."""
    part, _, suffix = name.rpartition(".")
    if not part.startswith("blk."):
        return f"{_END_NAMES[part]}.{suffix}", values
    _, layer, block = part.split(".")
    if block in ("attn_q", "attn_k"):
        heads = meta["llama.attention.head_count" if block == "attn_q" else "llama.attention.head_count_kv"]
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{_BLOCK_NAMES[block]}.{suffix}", values


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-05 was stored as float32
        "rope_theta": meta["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that cuts numbers into digits (what GGUF calls `smollm`)."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
