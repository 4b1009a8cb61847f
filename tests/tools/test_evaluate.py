"""`trireme eval`: scores by hand, and two plans of a tiny checkpoint behind a real tritonserver."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from trireme.core.refusal import Refusal
from trireme_tools.cli import build
from trireme_tools.evaluate import Answer, make_score
from trireme_tools.problems import held_out_problems
from trireme_tools.scrape import acceptance_length
from trireme_tools.small_tokenizer import END_ID, make_tokenizer, write_tokenizer


def test_scores():
    problems = held_out_problems(4)
    right = [Answer(problem.solution, [number]) for number, problem in enumerate(problems)]
    wrong = [Answer("#### 100000", [0]), *right[1:3], Answer(error="gone")]
    score = make_score("pp2", problems, wrong, right, 2.0, 1.5)
    assert (score.right, score.accuracy, score.same_as_first, score.output_tokens) == (2, 0.5, 3, 3)
    assert score.standard_error == 0.25 and score.errors == ("gone",)  # sqrt(1/2 * 1/2 / 4)
    assert make_score("one", problems, right, right, 2.0, None).as_json()["accuracy"] == 1.0


def test_acceptance_length_of_a_time():
    before = {("mtp_verifications", ""): 10.0, ("mtp_accepted_tokens", ""): 15.0}
    after = {("mtp_verifications", ""): 14.0, ("mtp_accepted_tokens", ""): 21.0}
    assert acceptance_length(before, after) == 2.5  # 6 drafts of 4 times, and a token of the model's own each time
    assert acceptance_length({}, {}) is None and acceptance_length(after, after) is None


def test_settings_are_of_servers_that_it_starts():
    with pytest.raises(Refusal, match="settings without a plan"):
        CliRunner().invoke(build(), ["eval", "--dtype=float32"], catch_exceptions=False)
    with pytest.raises(Refusal, match="'pq2' is no word of a plan"):
        CliRunner().invoke(build(), ["eval", "--plan=pq2"], catch_exceptions=False)


@pytest.mark.server
@pytest.mark.timeout(180)
def test_plans_of_a_tiny_checkpoint(tmp_path):
    """Weights are random, so that no answer is right; those of both plans are the same."""
    tokenizer = make_tokenizer((problem.prompt for problem in held_out_problems(200)), 400)
    write_tokenizer(tokenizer, tmp_path)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
        "eos_token_id": END_ID,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["eval", f"--model={tmp_path}", "--plan=one", "--plan=pp2", "--problems=6", "--max-tokens=12", "--json"]
    words += ["--load-format=dummy", "--threads-per-rank=1", "--kv-cache-memory-bytes=8000000"]
    result = CliRunner().invoke(build(), words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    one, two = map(json.loads, result.stdout.splitlines())
    assert (one["plan"], two["plan"]) == ("one", "pp2")
    for score in (one, two):
        assert score["problems"] == score["same_as_first"] == 6 and score["right"] == 0 and not score["errors"]
        assert 0 < score["output_tokens"] <= 6 * 12 and score["seconds"] > 0 and score["acceptance_length"] is None
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"trireme_{os.getpid()}_")]
