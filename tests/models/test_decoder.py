"""Decoders against transformers, float32: whole prompts, chunks, single steps, mixed steps, one to three stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chained import Chained, build_decoder
from tiny import HYBRID_FAMILIES, fuse_experts, greedy_tokens, prompt_logits, random_prompts, tiny_checkpoint, without_vision
from trireme.core.batch import Batch
from trireme.layers.block import PerRequest, PerToken
from trireme.layers.delta import GatedDeltaNet
from trireme.models.decoder import Decoder
from trireme.parallel.strips import Strips

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2}

CHECKPOINTS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 14, "num_key_value_heads": 1}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}}),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 sliding": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {}),
    "qwen3 tied biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe tied fused": ("qwen2_moe", {"tie_word_embeddings": True, "norm_topk_prob": True, "decoder_sparse_step": 1}),
    "qwen3_moe fused": ("qwen3_moe", {}),
    "qwen3_moe tied biased": ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True, "norm_topk_prob": False}),
    "qwen3 sliding yarn": ("qwen3", {**SLIDING, "rope_parameters": {**YARN, "attention_factor": 1.1}}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5 tied text": ("qwen3_5", {"tie_word_embeddings": True, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 3}),
    "qwen3_5_moe fused": ("qwen3_5_moe", {}),
    "qwen3_5_moe biased": ("qwen3_5_moe", {"attention_bias": True, "linear_num_value_heads": 2}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next tied yarn fused": ("qwen3_next", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "partial_rotary_factor": 0.4}}),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Path:
    family, overrides = CHECKPOINTS[request.param]
    directory = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), family, **overrides)
    if "fused" in request.param:
        fuse_experts(directory)
    return without_vision(directory) if "text" in request.param else directory


def test_logits_are_transformers(checkpoint: Path):
    [prompt] = random_prompts([75])
    logits = Chained(checkpoint, [5]).forward({0: prompt})
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, prompt_logits(checkpoint, prompt), atol=1e-4, rtol=0)


def test_greedy_tokens_are_transformers(checkpoint: Path):
    prompts = random_prompts([1, 17, 40])
    chained = Chained(checkpoint, [3, 2])
    ours = [chained.greedy(prompt, 24, sequence) for sequence, prompt in enumerate(prompts)]
    assert ours == greedy_tokens(checkpoint, prompts, 24)


@pytest.mark.parametrize("chunk", [1, 16, 23])
def test_chunks_equal_the_whole(checkpoint: Path, chunk: int):
    """With a chunk of one row this is decoding, step by step, and states are sums of another order."""
    [prompt] = random_prompts([48])
    chained = Chained(checkpoint, [5])
    whole = chained.forward({0: prompt})
    chunks = [chained.forward({1: prompt[start : start + chunk]}) for start in range(0, len(prompt), chunk)]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize("cut", [[3, 2], [1, 3, 1]])
def test_stages_equal_one(checkpoint: Path, cut: list[int]):
    [prompt] = random_prompts([40])
    assert torch.equal(Chained(checkpoint, cut).forward({0: prompt}), Chained(checkpoint, [5]).forward({0: prompt}))


def test_a_mixed_step_equals_lone_ones(checkpoint: Path):
    """A decode, a prefill and a later chunk in one step, each as if alone."""
    first, second, third = random_prompts([20, 33, 50])
    alone, mixed = Chained(checkpoint, [2, 3]), Chained(checkpoint, [2, 3])
    for chained in (alone, mixed):
        chained.forward({0: first[:-1], 2: third[:30]})
    together = mixed.forward({0: first[-1:], 1: second, 2: third[30:]}).split([1, 33, 20])
    for sequence, (tokens, logits) in enumerate(zip((first[-1:], second, third[30:]), together, strict=True)):
        torch.testing.assert_close(logits, alone.forward({sequence: tokens}), atol=2e-5, rtol=0)


def test_only_the_asked_rows_reach_the_head(checkpoint: Path):
    prompts = random_prompts([9, 14])
    chained = Chained(checkpoint, [5])
    whole = chained.forward(dict(enumerate(prompts)))
    last = Chained(checkpoint, [5]).forward(dict(enumerate(prompts)), head_rows=[8, 22])
    torch.testing.assert_close(last, whole[[8, 22]], atol=2e-5, rtol=0)


@pytest.fixture(scope="module", params=HYBRID_FAMILIES)
def hybrid(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hybrid"), request.param)


def test_stages_of_one_kind_of_layer(hybrid: Path):
    """Without attention; without a delta layer; of both."""
    cut = [2, 1, 2]
    kinds = [[type(keeps) for keeps in build_decoder(hybrid, cut, stage).keeps] for stage in range(3)]
    assert kinds == [[PerRequest] * 2, [PerToken], [PerRequest, PerToken]]
    prompts = random_prompts([5, 40])
    chained = Chained(hybrid, cut)
    together = chained.forward(dict(enumerate(prompts)))
    torch.testing.assert_close(together, torch.cat([prompt_logits(hybrid, prompt) for prompt in prompts]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [[4], [3, 1]])
def test_rows_stop_behind_a_last_layer_with_states(tmp_path: Path, cut: list[int]):
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_5", num_hidden_layers=4, layer_types=kinds)
    chained, prompts = Chained(checkpoint, cut), random_prompts([30, 9])
    assert isinstance(chained.decoders[-1][0].blocks[-3], GatedDeltaNet)
    assert len(chained.forward({0: prompts[0][:20]}, head_rows=[])) == 0
    logits = chained.forward({0: prompts[0][20:], 1: prompts[1]}, head_rows=[9, 18, 3])
    whole = [prompt_logits(checkpoint, prompt) for prompt in prompts]
    torch.testing.assert_close(logits, torch.stack([whole[0][29], whole[1][8], whole[0][23]]), atol=1e-4, rtol=0)


def test_a_slot_begins_anew(hybrid: Path):
    """What another sequence left there is not seen."""
    first, second = random_prompts([30, 30])
    chained = Chained(hybrid, [3, 2])
    chained.forward({0: first})
    chained.restart(0)
    torch.testing.assert_close(chained.forward({0: second}), prompt_logits(hybrid, second), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [[5], [2, 1, 2]])
def test_drafts_that_do_not_stand_leave_no_trace(hybrid: Path, cut: list[int]):
    """One sequence is verified in rows of a token and four drafts, of which 0 to 4 stand; beside it one decodes, and one is a
    prompt in chunks, short and long, so that a step's items advance in all ways."""
    text, plain, prompt = random_prompts([70, 70, 170])
    wanted = [prompt_logits(hybrid, tokens) for tokens in (text, plain, prompt)]
    chained = Chained(hybrid, cut, num_held=5)
    chained.forward({0: text[:20], 1: plain[:20]})
    at, done, replays = 20, 0, {}
    for step, stand in enumerate((3, 0, 4, 1, 2, 0, 4)):
        junk = [(token + 1) % 251 for token in text[at + 1 + stand : at + 5]]
        chunk = (17, 3, 40)[step % 3]
        new = {1: [plain[20 + step]], 0: [*text[at : at + 1 + stand], *junk], 2: prompt[done : done + chunk]}
        logits = chained.forward(new, holds={0}, replays=replays).split([1, 5, chunk])
        for found, expected in (
            (logits[0], wanted[1][20 + step : 21 + step]),
            (logits[1][: 1 + stand], wanted[0][at : at + 1 + stand]),
            (logits[2], wanted[2][done : done + chunk]),
        ):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        at, done, replays = at + 1 + stand, done + chunk, {0: 1 + stand}
    rest = chained.forward({0: text[at:]}, replays=replays)  # and goes on without drafts
    torch.testing.assert_close(rest, wanted[0][at:], atol=1e-4, rtol=0)


@pytest.fixture
def sliding(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "qwen2", **SLIDING)


def stage(checkpoint: Path, number: int) -> Decoder:
    return build_decoder(checkpoint, [2, 3], number)


def test_a_stage_has_its_blocks_and_nothing_else(sliding: Path):
    first, last = stage(sliding, 0), stage(sliding, 1)
    assert first.block_names == ("embed", "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp")
    assert last.block_names[:2] == ("layers.2.attn", "layers.2.mlp") and last.block_names[-1] == "head"
    assert (len(first.keeps), len(last.keeps)) == (2, 3)


def test_attention_is_planned_once_for_each_window(sliding: Path):
    lens, table = torch.tensor([4], dtype=torch.int32).numpy(), torch.zeros(1, 1, dtype=torch.int32).numpy()
    plans = [set(stage(sliding, number).plan_attention(lens, lens, table)) for number in (0, 1)]
    assert plans == [{0}, {21}]


def test_bfloat16_runs(sliding: Path):
    decoder = build_decoder(sliding, [5], 0, torch.bfloat16)
    assert {param.dtype for _, param in decoder.params()} == {torch.bfloat16}
    assert decoder.keeps[0].dtype == torch.bfloat16


def test_a_step_that_asks_nothing_gets_no_logits(sliding: Path):
    batch = Batch(torch.zeros(3), torch.zeros(3), torch.zeros(3), {}, None, ())
    [logits] = stage(sliding, 1).blocks[-1](Strips.of(torch.zeros(3, 48)).with_onward(slice(0, 0)), batch)
    assert logits.shape == (0, 251) and logits.dtype == torch.float32
