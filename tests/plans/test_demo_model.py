"""The demo model, a real one: 32 chat and completion prompts of mixed lengths over two stages give transformers' greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plans.whole import tokens_of
from tiny import oracle
from trireme.core.request import Request, Sampling
from trireme.core.settings import make_settings
from trireme.serve.text import Text
from trireme_tools import offline

pytestmark = pytest.mark.ranks

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
NUM_TOKENS = 64
TIE = 1e-4  # where the oracle's own two best logits are closer, float32 does not tell them apart

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about rowing.",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "List the planets of the solar system.",
    "Explain recursion to a child.",
    "What does a compiler do?",
    "Give me a recipe for pancakes with few ingredients.",
    "How many legs does a spider have?",
    "Summarise: The trireme was an ancient vessel and a type of galley that was used by the ancient maritime civilisations.",
    "Is water wet?",
    "Tell me a joke about pipelines.",
    "What is the square root of 144?",
]
BEGINNINGS = [
    "Once upon a time",
    "The quick brown fox",
    "In 1969, the first humans",
    "def fibonacci(n):",
    "A",
    "The three main ingredients of bread are flour, water and",
    "To be, or not to be,",
    "import numpy as np\n\n",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, " * 4,
    "1, 2, 3, 4, 5,",
    "The recipe begins with two cups of",
    "Dear Sir or Madam,",
    "Der schnelle braune Fuchs",
    "Photosynthesis is the process by which",
    "Monday, Tuesday, Wednesday,",
    "The pipeline has two stages. " * 12,
]


@pytest.fixture(scope="module")
def text() -> Text:
    if not (MODEL / "model.safetensors").exists():
        pytest.skip("the demo model is not there: `trireme fetch-demo`")
    text = Text.read(MODEL)
    assert text is not None
    return text


def test_two_stages_give_the_demo_models_own_tokens(pool, text):
    chats = [text.encode(text.render([{"role": "user", "content": question}]), add_special_tokens=False) for question in QUESTIONS]
    prompts = chats + [text.encode(beginning) for beginning in BEGINNINGS]
    greedy = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    requests = [Request(id=str(i), prompt=prompt, sampling=greedy) for i, prompt in enumerate(prompts)]
    settings = make_settings({"model": str(MODEL), "pipeline_parallel_size": 2, "max_model_len": 512, "threads_per_rank": 1})
    with offline.running(settings, pool) as engine:
        answers = tokens_of(engine, requests)
    assert text.decode(answers[0]).startswith("The capital of France is Paris")

    model, ties = oracle(MODEL), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        best, second = logits.topk(2).values.unbind(-1)
        for token, row, margin in zip(answer, logits, best - second, strict=True):
            if margin < TIE:
                ties += 1
                break  # the oracle may go either way from here
            assert token == row.argmax()
    assert ties <= 2, "ties are rare in a real model"
