"""A GGUF as a checkpoint: a tiny llama through the conversion, against the weights it was written from."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trireme.core.refusal import Refusal

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, INTER, VOCAB = 32, 4, 2, 64, 260


def write_gguf(path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A one-layer model with Q8_0 matrices; its float32 values by GGUF name, as dequantised."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # byte-level alphabet
    writer.add_token_list(["<end>", *letters, "ab", "<x>", "<y>"][:VOCAB])
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (INTER, HIDDEN),
        "blk.0.ffn_up.weight": (INTER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTER),
    }
    values = {}
    for name, shape in shapes.items():
        plain = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, plain)
            values[name] = plain
        else:
            packed = gguf.quantize(plain, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_llama_converts_exactly(tmp_path):
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    from trireme_tools.gguf_llama import convert

    values, seen = write_gguf(tmp_path / "tiny.gguf"), []
    convert(tmp_path / "tiny.gguf", tmp_path / "out", lambda done, total: seen.append((done, total)))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert seen[-1] == (11, 11) and len(tensors) == 11
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], values["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], values["token_embd.weight"])
    # head 0 has 8 rows: GGUF's x0 y0 x1 y1 ... become x0 x1 x2 x3 y0 y1 y2 y3
    np.testing.assert_array_equal(
        tensors["model.layers.0.self_attn.q_proj.weight"][:8], values["blk.0.attn_q.weight"][[0, 2, 4, 6, 1, 3, 5, 7]]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5 and config["num_key_value_heads"] == KV_HEADS
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("<end>ab1").tokens == ["<end>", "ab", "1"]
    assert tokenizer.decode(tokenizer.encode("naïve 42").ids) == "naïve 42"


def test_another_architecture_is_refused(tmp_path):
    from trireme_tools.gguf_llama import convert

    write_gguf(tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(Refusal, match="mamba"):
        convert(tmp_path / "other.gguf", tmp_path / "out", lambda done, total: None)
