"""Whole answers of an engine with real ranks, for tests: submit requests, wait, read. `trireme generate` does the same for tokens."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from tiny import oracle
from trireme.core.request import Emission, Request
from trireme.engine.engine import Engine

Heard = Mapping[str, Sequence[Emission]]
"""Emissions of each request so far, by its id."""


def emissions_of(
    engine: Engine, requests: Sequence[Request], timeout_s: float = 240, look: Callable[[Heard], None] = lambda heard: None
) -> list[list[Emission]]:
    """All emissions of each request, in the order of `requests`. `look` sees what was heard after each of them."""
    news: queue.SimpleQueue[Emission] = queue.SimpleQueue()
    heard: dict[str, list[Emission]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request, news.put)
    left = sum(request.sampling.n for request in requests)
    while left:
        emission = news.get(timeout=timeout_s)
        heard[emission.request_id].append(emission)
        look(heard)
        left -= emission.finish_reason is not None
    return list(heard.values())


def kill_at(num_tokens: int, process: psutil.Process) -> Callable[[Heard], None]:
    """To look with: kills the process once any answer has so many tokens."""
    alive = [process]

    def look(heard: Heard) -> None:
        if alive and max(sum(len(emission.tokens) for emission in answer) for answer in heard.values()) >= num_tokens:
            alive.pop().send_signal(signal.SIGKILL)

    return look


def tokens_of(
    engine: Engine, requests: Sequence[Request], timeout_s: float = 240, look: Callable[[Heard], None] = lambda heard: None
) -> list[list[int]]:
    """Output tokens of each request, of n = 1."""
    answers = emissions_of(engine, requests, timeout_s, look)
    for answer in answers:
        assert answer[-1].error is None, answer[-1].error
    return [[token for emission in answer for token in emission.tokens] for answer in answers]


def assert_same_tokens(model_dir: Path, prompts: Sequence[Sequence[int]], answers: list[list[int]], expected: list[list[int]]) -> None:
    """Equal, up to a step at which the oracle's own two best logits lie closer than float32 tells apart."""
    for prompt, answer, wanted in zip(prompts, answers, expected, strict=True):
        assert len(answer) == len(wanted)
        if answer != wanted:
            at = next(i for i, (one, other) in enumerate(zip(answer, wanted, strict=True)) if one != other)
            with torch.inference_mode():
                best, second = oracle(model_dir)(torch.tensor([[*prompt, *wanted[:at]]])).logits[0, -1].topk(2).values
            assert best - second < 1e-4, f"token {at} after a prompt of {len(prompt)}: {answer[at]}, transformers says {wanted[at]}"
