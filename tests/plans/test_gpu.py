"""One GPU gives transformers' tokens: every family in float32, with graphs and without, under preemption and reuse; bfloat16 within
its rounding; drawn tokens, penalties and logprobs as on a CPU; a step is launched without waiting for the device, and
compiles nothing."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from any_steps import any_steps
from drafted import draft_well
from plans.test_plans import NUM_TOKENS, PROMPTS
from plans.whole import emissions_of, tokens_of
from tiny import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, greedy_tokens, prompt_logits, tiny_checkpoint
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme.core.step import FED, Open, Step, ints
from trireme.parallel.link import SoloLink
from trireme.ranks.load import load_runner
from trireme.ranks.runner import Runner
from trireme_tools import offline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

EVERY = (*FAMILIES, *MOE_FAMILIES, *HYBRID_FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(root / family, family, num_hidden_layers=4) for family in EVERY}


def settings(folder: Path, **values) -> Settings:
    base = {"model": str(folder), "device": "cuda", "max_model_len": 256, "max_num_seqs": 12, "num_pages": 200}
    return make_settings(base | values)


def greedy(prompts: list[list[int]]) -> list[Request]:
    return [
        Request(id=str(i), prompt=prompt, sampling=Sampling(max_tokens=NUM_TOKENS, temperature=0.0)) for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("family", EVERY)
def test_tokens_are_those_of_transformers(pool, checkpoints, family):
    expected = greedy_tokens(checkpoints[family], PROMPTS, NUM_TOKENS)
    with offline.running(settings(checkpoints[family]), pool) as engine:
        assert tokens_of(engine, greedy(PROMPTS)) == expected
        again = [Request(id=f"{request.id} again", prompt=request.prompt, sampling=request.sampling) for request in greedy(PROMPTS)[-4:]]
        assert tokens_of(engine, again) == expected[-4:]  # with pages to reuse


@pytest.mark.parametrize(
    "values",
    [
        {"enforce_eager": True},
        {"async_depth": 0, "max_num_batched_tokens": 16},
        {"async_depth": 2, "num_pages": 24, "max_num_batched_tokens": 64},
    ],
    ids=["eager", "depth 0, chunks of 16", "depth 2, few pages"],
)
def test_settings_change_nothing(pool, checkpoints, values):
    with offline.running(settings(checkpoints["qwen3"], **values), pool) as engine:
        assert tokens_of(engine, greedy(PROMPTS)) == greedy_tokens(checkpoints["qwen3"], PROMPTS, NUM_TOKENS)
        assert (engine.stats.preemptions > 0) == ("num_pages" in values)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory) -> Path:
    """A checkpoint whose head is often right."""
    return draft_well(tiny_checkpoint(tmp_path_factory.mktemp("drafting"), "qwen3_5_moe", num_hidden_layers=4), sureness=0.9)


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_drafts_change_no_token(pool, drafting, num_drafts, eager):
    values = {"mtp": {"num_tokens": num_drafts, "adaptive": num_drafts == 2}, "enforce_eager": eager}
    with offline.running(settings(drafting, **values), pool) as engine:
        assert tokens_of(engine, greedy(PROMPTS)) == greedy_tokens(drafting, PROMPTS, NUM_TOKENS)
        assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens


def test_drawn_tokens_penalties_and_logprobs_are_those_of_a_cpu(pool, checkpoints):
    asked = [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6, "logprobs": 3},
        {"temperature": 1.1, "top_k": 20, "min_p": 0.01, "seed": 7, "prompt_logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 0},
        {"temperature": 0.7, "presence_penalty": 0.5, "logit_bias": {7: 2.0}, "bad_words": ((9,),), "seed": 8},
    ]
    heard = []
    for device in ("cpu", "cuda"):
        requests = [
            Request(id=str(i), prompt=prompt, sampling=Sampling(**{"max_tokens": 16} | sampling))
            for i, (prompt, sampling) in enumerate(zip(PROMPTS[-5:], asked, strict=True))
        ]
        with offline.running(settings(checkpoints["llama"], device=device), pool) as engine:
            heard.append(emissions_of(engine, requests))
    for one, other in zip(*heard, strict=True):
        assert [token for emission in one for token in emission.tokens] == [token for emission in other for token in emission.tokens]
        told, others = ([entry for emission in each for entry in emission.logprobs or []] for each in (one, other))
        assert [entry.value for entry in told] == pytest.approx([entry.value for entry in others], abs=1e-4)
        assert [entry.top_ids for entry in told] == [entry.top_ids for entry in others]
    (told,) = [emission.prompt_logprobs for emission in heard[1][2] if emission.prompt_logprobs is not None]
    wanted = prompt_logits(checkpoints["llama"], PROMPTS[-3]).log_softmax(-1)
    assert [entry.value for entry in told[1:]] == pytest.approx(
        [wanted[i, token].item() for i, token in enumerate(PROMPTS[-3][1:])], abs=1e-4
    )


def test_bfloat16_is_near(pool, tmp_path):
    """Heads as of large models, so that the attention is FlashInfer's; weights small, so that rounding is all there is."""
    folder = tiny_checkpoint(tmp_path, "qwen3", num_attention_heads=8, num_key_value_heads=2, head_dim=128, num_hidden_layers=2)
    prompt = PROMPTS[7]
    request = Request(id="0", prompt=prompt, sampling=Sampling(max_tokens=8, temperature=0.0, prompt_logprobs=0))
    with offline.running(settings(folder, dtype="bfloat16"), pool) as engine:
        [answer] = emissions_of(engine, [request])
    (told,) = [emission.prompt_logprobs for emission in answer if emission.prompt_logprobs is not None]
    wanted = prompt_logits(folder, prompt).log_softmax(-1)
    errors = [abs(entry.value - wanted[i, token].item()) for i, (entry, token) in enumerate(zip(told[1:], prompt[1:], strict=True))]
    assert np.mean(errors) < 0.1 and max(errors) < 0.6
    logits, output = prompt_logits(folder, prompt), [token for emission in answer for token in emission.tokens]
    assert logits[-1].max() - logits[-1, output[0]] < 0.3


def decode(runner: Runner, temperature: float, drafts: int = 0) -> list[int]:
    """Four prompts in one step, then steps fed back, each launched before the last one's tokens are known and without a wait. Their
    tokens, then so many drafts after each."""
    runner.begin(SoloLink())
    slots, length = range(4), 20
    opens = [Open(slot, Sampling(max_tokens=99, temperature=temperature, seed=slot), length) for slot in slots]
    writes = np.array([(slot, index, 4 * slot + index) for slot in slots for index in range(4)], np.int32)
    prompts = ints(np.arange(4 * length) % 200 + 3)
    items = ints(slots), ints([0] * 4), ints([length] * 4), ints([1] * 4)
    more = {"returns": True, "nexts": ints([-1] * 4)}
    pending = [runner.run(Step(0, 0, *items, prompts, opens=opens, page_writes=writes.tobytes(), **more), None, 0.0)]
    pending[0].finish()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 9):
            items = ints(slots), ints([length + number - 1] * 4), ints([1] * 4), ints([1] * 4)
            pending.append(runner.run(Step(0, number, *items, ints([FED] * 4), drafts=drafts, **more), None, 0.0))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    outcomes = [each.finish()[0] for each in pending]
    return [token for each in outcomes for token in np.frombuffer(each.tokens + each.drafts, np.int32).tolist()]


@pytest.mark.parametrize(("family", "drafts"), [("qwen3", 0), ("qwen3_moe", 0), ("qwen3_5", 0), ("qwen3_5_moe", 3)])
def test_steps_are_launched_without_waiting(checkpoints, family, drafts):
    told = []
    for eager in (False, True):
        runner = load_runner(settings(checkpoints[family], enforce_eager=eager), 0, 0, progress=lambda sentence: None)
        told.append([decode(runner, temperature, drafts) for temperature in (0.0, 0.8)])
    assert told[0] == told[1]
    assert told[0][0] != told[0][1]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16"), ("qwen3_5_moe", "bfloat16"), ("qwen3_5_moe", "float32")])
def test_nothing_is_compiled_once_a_rank_is_loaded(checkpoints, monkeypatch, family, dtype, eager):
    """For steps of prompts of 1 to 200 tokens amid decodes and drafts, however they are sampled. What this process has compiled before
    is forgotten first."""
    triton = pytest.importorskip("triton")
    sizes = {"max_num_seqs": 40, "max_num_batched_tokens": 512, "num_pages": 40 * 16}
    mtp = {"mtp": {"num_tokens": 2}} if family in HYBRID_FAMILIES else {}
    made = settings(checkpoints[family], dtype=dtype, enforce_eager=eager, **sizes, **mtp)
    for kernel in every_kernel():
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        monkeypatch.setattr(kernel, "variants", {}, raising=False)
    runner, compiled = load_runner(made, 0, 0, progress=lambda sentence: None), []

    def note(*, repr: str, **rest) -> None:
        compiled.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    runner.begin(SoloLink())
    for step in any_steps(made, 150, num_drafts=2 if mtp else 0, vocab_size=251):
        runner.run(step, None, 0.0).finish()
        assert not compiled, f"{step.num_items} items, {step.num_rows} rows"


def every_kernel() -> list[Any]:
    """Of all ops, as far as anything has imported them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("trireme_kernels.") and name.endswith(".tl")]
    return [value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")]
