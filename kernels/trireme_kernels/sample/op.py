"""Signature of sample."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("reference",)


class Sample(Protocol):
    """Sizes a case may name: vocab."""

    def __call__(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
    ) -> Tensor:
        """logits float32 [n, V] (-inf bans a token), temperature float [n] (0 is greedy), top_k integer [n] (0 keeps all),
        top_p float [n] (1 keeps all), min_p float [n] (0 keeps all), seeds int64 [n], positions int64 [n] -> tokens int64 [n].

        As vLLM: logits / temperature; tokens less likely than min_p times the likeliest are dropped; then all but the top_k
        (and what ties with the last of them); then, of what is left, those below which the likelier ones already hold
        top_p. One of the rest is drawn with random numbers that are a function of (seed, position, token) alone, so a
        row's token does not depend on the batch around it.
        """
        ...
