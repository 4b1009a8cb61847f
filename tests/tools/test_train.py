"""`trireme train` at toy size: it learns, its checkpoint is transformers' and ours to read, and its head sees no later token."""

from __future__ import annotations

import json
import math
from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from chained import Chained
from drafted import DraftOracle
from tiny import prompt_logits
from trireme.core.refusal import Refusal
from trireme.serve.text import Text
from trireme_tools.cli import build
from trireme_tools.learning import Recipe, _Batches, learn
from trireme_tools.problems import held_out_problems
from trireme_tools.small_model import Learner, small_config, write_model
from trireme_tools.small_tokenizer import END_ID, make_tokenizer

TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By a clock on which a step takes three seconds: as many of them on any machine."""
    output = tmp_path_factory.mktemp("trained")
    recipe = Recipe(seed=1, minutes=1.0, batch_size=8, learning_rate=1e-2, evaluate_every_s=40.0, num_evaluated=2, num_evaluated_last=4)
    return output, learn(recipe, output, "cpu", lambda entry: None, clock=count(step=3.0).__next__, **TOY)


def test_it_learns(trained):
    """Far enough in seconds to see that gradients reach the trunk and the head."""
    output, entries = trained
    assert [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()] == entries
    assert [entry["step"] for entry in entries if "exact_match" in entry] == [14, 19] and entries[-1]["progress"] == 1.0
    last, untaught = entries[-1], math.log(json.loads((output / "config.json").read_text())["vocab_size"])
    assert last["loss"] < untaught - 1.0 and max(last["draft_losses"]) < untaught - 1.0
    assert last["held_out"] == 4 and 0.0 <= last["exact_match"] <= 1.0
    assert json.loads((output / "train.json").read_text())["recipe"]["seed"] == 1


def test_transformers_reads_the_checkpoint(trained):
    output, _ = trained
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16 and model.config.mtp_num_hidden_layers == 1
    tensors = load_file(output / "model.safetensors")
    assert torch.equal(model.model.layers[3].self_attn.q_proj.weight, tensors["model.layers.3.self_attn.q_proj.weight"])
    heads = {name.removeprefix("mtp.layers.0.") for name in tensors if name.startswith("mtp.layers.0.")}
    assert heads == {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"} <= set(tensors)


def test_our_loader_reads_the_checkpoint(trained):
    output, _ = trained
    tokens = Text.read(output).encode(held_out_problems(1)[0].prompt)
    torch.testing.assert_close(Chained(output, [4]).forward({0: tokens}), prompt_logits(output, tokens), atol=1e-4, rtol=0)


def test_the_head_that_learned_is_the_one_that_drafts(trained, tmp_path):
    """Against the head that tests of drafts put together from a checkpoint's tensors: row p, with token p + 1, learns token p + 2."""
    output, _ = trained
    learner = Learner(small_config(json.loads((output / "config.json").read_text())["vocab_size"], END_ID, **TOY)).eval()
    tensors = load_file(output / "model.safetensors")
    learner.load_state_dict({name if name.startswith("mtp.") else f"trunk.{name}": tensor for name, tensor in tensors.items()})
    write_model(learner, tmp_path, torch.float32)
    tokens = torch.tensor([Text.read(output).encode(held_out_problems(1)[0].prompt)])
    model = learner.trunk.model
    with torch.inference_mode():
        rows = model(tokens[:, :-1]).last_hidden_state
        positions = model.rotary_emb(rows, torch.arange(tokens.shape[1] - 1).expand(3, 1, -1))
        drafted = learner.trunk.lm_head(learner.mtp(model.embed_tokens(tokens[:, 1:]), rows, positions))[0]
        learnt = learner(tokens, torch.ones(tokens.shape)).drafts[0]
    wanted = DraftOracle(tmp_path).logits(tokens[0].tolist())
    torch.testing.assert_close(drafted, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(learnt, torch.nn.functional.cross_entropy(wanted[:-1], tokens[0, 2:]), atol=1e-4, rtol=0)


def test_front_and_transformers_agree_on_tokens(trained):
    output, _ = trained
    ours, theirs = Text.read(output), AutoTokenizer.from_pretrained(output)
    problem = held_out_problems(1)[0]
    for text in (problem.prompt, problem.prompt + problem.solution, "naïve 12345\n\n 😀 x_y"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    asked = [{"role": "user", "content": problem.story}]
    assert ours.render(asked) == theirs.apply_chat_template(asked, tokenize=False) == problem.prompt
    assert ours.encode(problem.prompt) + ours.encode(problem.solution) == ours.encode(problem.prompt + problem.solution)


def test_batches_do_not_depend_on_who_makes_them():
    tokenizer = make_tokenizer((problem.prompt + problem.solution for problem in held_out_problems(200)), 512)
    recipe = Recipe(seed=0, minutes=1, batch_size=3, learning_rate=0.1, evaluate_every_s=1)
    batches = _Batches(recipe, tokenizer)
    (tokens, weights), (again, _), (other, _) = batches[5], batches[5], batches[6]
    assert torch.equal(tokens, again) and not (tokens.shape == other.shape and torch.equal(tokens, other))
    for row, weight in zip(tokens, weights, strict=True):
        said = int((weight > 0).sum())
        assert row[said - 1] == END_ID and END_ID not in row[: said - 1] and (row[said:] == END_ID).all()
        assert tokenizer.decode(row[weight == 1].tolist()).startswith(" ")
    assert tokens.shape[1] % 64 == 0


def test_no_checkpoint_is_written_over(trained):
    with pytest.raises(Refusal, match=r"is a checkpoint already.*--force"):
        CliRunner().invoke(build(), ["train", str(trained[0])], catch_exceptions=False)


def test_the_head_sees_no_later_token():
    torch.manual_seed(0)
    learner = Learner(small_config(64, 0, **TOY)).eval()
    rows, embedded = torch.randn(1, 9, 32), torch.randn(1, 9, 32)
    positions = learner.trunk.model.rotary_emb(rows, torch.arange(9).expand(3, 1, -1))
    drafted = learner.mtp(embedded, rows, positions)
    rows[:, 6] += 1.0
    embedded[:, 7] += 1.0
    changed = learner.mtp(embedded, rows, positions)
    assert torch.allclose(drafted[:, :6], changed[:, :6], atol=1e-6) and not torch.allclose(drafted[:, 6:], changed[:, 6:], atol=1e-3)
