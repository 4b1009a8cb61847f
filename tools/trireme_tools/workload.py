"""Workloads of `trireme bench`: prompts and lengths, the same for every peer. Sends nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trireme.core.refusal import Refusal
from trireme_tools.problems import held_out_problems


@dataclass(frozen=True)
class Ask:
    """One request of a benchmark: random tokens, so that no prompt shares a page with another, and an exact output length."""

    prompt: tuple[int, ...]
    num_output: int
    temperature: float = 0.0


def make_workload(num_requests: int, inputs: str, outputs: str, vocab_size: int, seed: int = 0) -> list[Ask]:
    """`inputs` and `outputs` are lengths, `128` or uniform `100-1024`. Token ids start at 3: low ones often are special."""
    rng = np.random.default_rng(seed)
    input_lens, output_lens = (_lengths(text, num_requests, rng) for text in (inputs, outputs))
    return [
        Ask(tuple(rng.integers(3, vocab_size, length).tolist()), int(made)) for length, made in zip(input_lens, output_lens, strict=True)
    ]


def seqs256(vocab_size: int) -> list[Ask]:
    """The 256-sequence workload of nano-vllm's bench, token for token: in and out uniform 100-1024, ids up to 10000, seed 0."""
    draw = random.Random(0)
    prompts = [tuple(draw.randint(0, 10000) % vocab_size for _ in range(draw.randint(100, 1024))) for _ in range(256)]
    return [Ask(prompt, draw.randint(100, 1024)) for prompt in prompts]


def word_problems(num_requests: int, encode: Callable[[str], Sequence[int]]) -> list[Ask]:
    """Held-out problems of `trireme eval`, each with as many output tokens as its solution has: text that a model can foresee."""
    return [Ask(tuple(encode(problem.prompt)), len(encode(problem.solution))) for problem in held_out_problems(num_requests)]


def arrivals(num_requests: int, rate: float | None, seed: int = 0) -> np.ndarray:
    """Seconds at which requests are sent: a Poisson process of `rate` a second, or all at once."""
    if rate is None:
        return np.zeros(num_requests)
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, num_requests))


def _lengths(text: str, count: int, rng: np.random.Generator) -> np.ndarray:
    try:
        low, _, high = text.partition("-")
        first, last = int(low), int(high or low)
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise Refusal(f"length {text!r} is not understood", why="it is a number of tokens, or two", fix="write 128 or 100-1024")
    return rng.integers(first, last + 1, count)
