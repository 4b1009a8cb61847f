"""Start-up checks refuse in one line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.serve import checks
from trireme.serve.checks import ServerFlags, check_checkpoint, check_instance, check_server


def settings(**values):
    return make_settings({"model": "/nowhere", "device": "cpu", **values})


def test_flags_in_both_spellings():
    words = [
        "tritonserver",
        "--model-control-mode=explicit",
        "--allow-metrics",
        "false",
        "--backend-config=python,thread-pool-size=64",
    ]
    assert ServerFlags.read(words) == ServerFlags(explicit=True, metrics=False, thread_pool=64)
    words = ["tritonserver", "--backend-config", "python,thread-pool-size=48", "--backend-config=onnx,thread-pool-size=1"]
    assert ServerFlags.read(words) == ServerFlags(thread_pool=48)
    assert ServerFlags.read([]) == ServerFlags()
    assert not ServerFlags.read(["tritonserver", "--allow-metrics=false"]).metrics


def test_defaults_serve_four_stages():
    check_server(settings(pipeline_parallel_size=4), ServerFlags())


def test_too_small_thread_pool():
    with pytest.raises(Refusal, match="thread-pool-size=38"):
        check_server(settings(pipeline_parallel_size=5), ServerFlags())
    check_server(settings(pipeline_parallel_size=5), ServerFlags(thread_pool=38))


def test_eplb_takes_a_call_of_each_stage():
    balanced = settings(pipeline_parallel_size=5, eplb={})
    with pytest.raises(Refusal, match="thread-pool-size=43"):
        check_server(balanced, ServerFlags(thread_pool=42))
    check_server(balanced, ServerFlags(thread_pool=43))


def test_too_little_shared_memory(monkeypatch):
    monkeypatch.setattr(checks.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    with pytest.raises(Refusal, match="shm-size"):
        check_server(settings(), ServerFlags())


def test_missing_checkpoint(tmp_path):
    with pytest.raises(Refusal, match=r"config.json is missing.*fetch-demo"):
        check_checkpoint(settings(model=str(tmp_path)))
    _write_config(tmp_path)
    with pytest.raises(Refusal, match=r"no \.safetensors"):
        check_checkpoint(settings(model=str(tmp_path)))
    check_checkpoint(settings(model=str(tmp_path), load_format="dummy", max_model_len=64))


def test_missing_tokenizer(tmp_path):
    """One that is named; a checkpoint may be without."""
    _write_config(tmp_path)
    named = settings(model=str(tmp_path), load_format="dummy", tokenizer=str(tmp_path / "elsewhere"))
    with pytest.raises(Refusal, match=r"no tokenizer in .*elsewhere"):
        check_checkpoint(named)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tokenizer.json").touch()
    check_checkpoint(named)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"pipeline_parallel_size": 3}, "3 stages"),
        ({"pipeline_parallel_size": 2, "layer_cut": [2, 2]}, "does not cut 2 layers"),
        ({"max_model_len": 65}, "use max_model_len=64"),
    ],
)
def test_checkpoint_too_small(tmp_path, values, sentence):
    _write_config(tmp_path)
    with pytest.raises(Refusal, match=sentence):
        check_checkpoint(settings(model=str(tmp_path), load_format="dummy", **values))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"tensor": 4}, r"tp=4 does not divide 6 query heads.*each rank needs whole heads.*use tp=3"),
        ({"tensor": 3}, r"tp=3 does not divide 2 key/value heads.*use tp=2"),
        ({"tensor": 2}, r"tp=2 does not divide 9 columns of the MLP"),
        ({"expert": 2}, r"ep=2 times moe_dp=1 does not divide the 1 ranks of a stage"),
        ({"context": 4, "expert": 4}, r"ep=4 does not divide 6 experts.*use ep=3"),
        ({"context": 2}, r"moe_tp=2 does not divide 9 columns of an expert"),
        ({"context": 4, "moe_data": 2}, r"moe_dp=2 with cp=4.*use moe_dp=1 or moe_dp=4"),
    ],
)
def test_plan_that_the_checkpoint_does_not_allow(tmp_path, sizes, sentence):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 9, "head_dim": 2}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "mlp_only_layers": [0]}
    _write_config(tmp_path, architectures=["Qwen3MoeForCausalLM"], **heads, **experts)
    values = {f"{name}_parallel_size": size for name, size in sizes.items()}
    with pytest.raises(Refusal, match=sentence):
        check_checkpoint(settings(model=str(tmp_path), load_format="dummy", **values))


def test_unknown_kind_of_checkpoint(tmp_path):
    _write_config(tmp_path, architectures=["MambaForCausalLM"])
    with pytest.raises(Refusal, match="MambaForCausalLM"):
        check_checkpoint(settings(model=str(tmp_path)))


def _write_config(directory, **values):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    config = {"architectures": ["LlamaForCausalLM"], **sizes, "max_position_embeddings": 64, **values}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([{"kind": "KIND_GPU", "count": 1}], "use KIND_CPU there, and set devices"),
        ([{"kind": "KIND_CPU", "count": 2}], "count: 1"),
        ([{"kind": "KIND_CPU", "count": 1}] * 2, "one instance"),
    ],
)
def test_instance_groups(groups, sentence):
    with pytest.raises(Refusal, match=sentence):
        check_instance({"name": "stage_0", "instance_group": groups})
