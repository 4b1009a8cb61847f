"""Arguments that cannot work are refused by the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from trireme.core.refusal import Refusal
from trireme_tools.cli import build


@pytest.fixture
def checkpoint(tmp_path):
    """config.json alone."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8, "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, "max_position_embeddings": 64}))
    return tmp_path


@pytest.mark.parametrize("words", [("--requests", "0"), ("--concurrency", "0"), ("--rate", "0")])
def test_bench_of_nothing(words):
    result = CliRunner().invoke(build(), ["bench", *words])
    assert result.exit_code == 2 and "Invalid value" in result.output


@pytest.mark.parametrize("verb", ["repo", "serve"])
@pytest.mark.parametrize(
    ("words", "sentence"), [(("--tp=3",), "tp=3 does not divide 4 query heads"), (("--tp=2", "--ep=2"), "llama is dense")]
)
def test_plan_that_the_checkpoint_does_not_allow(checkpoint, verb, words, sentence):
    place = [str(checkpoint / "repository")] if verb == "repo" else []
    with pytest.raises(Refusal, match=sentence):
        CliRunner().invoke(build(), [verb, str(checkpoint), *place, "--load-format=dummy", *words], catch_exceptions=False)
    assert not (checkpoint / "repository").exists()


def test_devices_are_of_the_host_that_serves(checkpoint):
    words = [str(checkpoint), str(checkpoint / "repository"), "--load-format=dummy", "--devices=998;999", "--pp=2"]
    assert CliRunner().invoke(build(), ["repo", *words]).exit_code == 0
    with pytest.raises(Refusal, match="devices names GPU 999"):
        CliRunner().invoke(build(), ["serve", "--repository", words[1]], catch_exceptions=False)


def test_repository_that_cannot_be_written(checkpoint):
    (checkpoint / "file").touch()
    words = [str(checkpoint), str(checkpoint / "file" / "below"), "--load-format=dummy"]
    with pytest.raises(Refusal, match="cannot be written"):
        CliRunner().invoke(build(), ["repo", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "sentence"), [(("/nowhere",), "/nowhere cannot be read"), (("/nowhere", "--steps", "few"), "steps 'few' are not two numbers")]
)
def test_trace_of_nothing(words, sentence):
    with pytest.raises(Refusal, match=sentence):
        CliRunner().invoke(build(), ["trace", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--decode", "1,few"), "'few' is no number"),
        (("--decode", "1", "--input-len", "8-16"), "'8-16' is no number"),
        (("--drafts", "0,x"), "'x' is no number"),
        (("--prefill", "3by8"), "'3by8' is not understood"),
        (("--plot", "/nowhere.json"), "a report cannot be read"),
    ],
)
def test_bench_of_what_is_no_number(checkpoint, words, sentence):
    with pytest.raises(Refusal, match=sentence):
        CliRunner().invoke(
            build(), ["bench", "--offline", "--model", str(checkpoint), "--load-format=dummy", *words], catch_exceptions=False
        )
