"""Prompts of `trireme generate` are refused by line."""

from __future__ import annotations

import json

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme_tools.generate import read_requests


@pytest.fixture
def settings(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, "max_position_embeddings": 64}))
    return make_settings({"model": str(tmp_path)})


def test_prompts(settings, tmp_path):
    path = tmp_path / "prompts"
    path.write_text('{"input_ids": [0, 15]}\n\n{"input_ids": [3]}\n')
    assert [request.prompt for request in read_requests(settings, str(path), {})] == [[0, 15], [3]]


@pytest.mark.parametrize(
    "line", ["[1]", "{}", '{"input_ids": []}', '{"input_ids": [16]}', '{"input_ids": [-1]}', '{"input_ids": [1.0]}', "x"]
)
def test_no_prompts(settings, tmp_path, line):
    path = tmp_path / "prompts"
    path.write_text(f'{{"input_ids": [1]}}\n{line}\n')
    with pytest.raises(Refusal, match="line 2"):
        read_requests(settings, str(path), {})


def test_no_file(settings, tmp_path):
    with pytest.raises(Refusal, match="cannot be read"):
        read_requests(settings, str(tmp_path / "nothing"), {})
