"""Request: what a user asked, already checked; Emission: a piece of its answer in tokens. Text lives in serve/text."""

from __future__ import annotations

import msgspec
import numpy as np


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick tokens and when to stop; vLLM's names and meanings. Built and checked by `engine.sampling`."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    seed: int = 0  # given at admission where the user gave none; n > 1 uses seed, seed + 1, ...
    stop: tuple[str, ...] = ()  # matched on text, by serve/text
    stop_token_ids: tuple[int, ...] = ()  # ends of sequence, the checkpoint's included unless ignore_eos
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not appear
    n: int = 1
    logprobs: int | None = None  # top alternatives for every output token
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def waits_for_token(self) -> bool:
        """Whether the next step needs this sequence's last token on the CPU first (so it cannot be fed back)."""
        return any(len(word) > 1 for word in self.bad_words)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt in tokens. `priority`: lower goes first. `deadline`: time.monotonic() seconds, None for never."""

    id: str
    prompt: list[int]
    sampling: Sampling
    priority: int = 0
    deadline: float | None = None
    routed_experts: bool = False  # whether each token's experts are told


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a token among its alternatives, before temperature, penalties and cuts."""

    token: int
    value: float
    rank: int  # 1 for the most likely
    top_ids: list[int]
    top_values: list[float]


class Emission(msgspec.Struct, frozen=True, kw_only=True):
    """News of one sequence (`index` of the request's n): tokens since the last emission, and how it ended, if it did."""

    request_id: str
    index: int = 0
    tokens: list[int] = []  # without the stop token that ended it
    logprobs: list[Logprobs] = []  # one for each of `tokens`, where asked
    prompt_logprobs: list[Logprobs | None] | None = None  # once, with the first token; None for the first position
    routed_experts: np.ndarray | None = None  # int16 [rows, layers * experts of a row], where asked: rows computed since the last emission
    finish_reason: str | None = None  # "stop" | "length" | "cancelled" | "deadline" | "error"
    error: Exception | None = None  # with finish_reason "error", "cancelled" or "deadline"
    num_cached_tokens: int = 0  # prompt tokens whose pages were reused
