"""Signature of sample."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Sample(Protocol):
    """Sizes a case may name: vocab."""

    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """logits float32 [n, C] (-inf bans a token), temperature float [n] (0 is greedy), top_k integer [n] (0 keeps all),
        top_p float [n] (1 keeps all), min_p float [n] (0 keeps all), seeds int64 [n], positions int64 [n], ids int64
        [1 or n, C]: the token of each column, rising along a row (None: its number) -> (tokens int64 [n], scores float32 [n]).

        As vLLM: logits / temperature; tokens less likely than min_p times the likeliest are dropped; then all but the top_k
        (and what ties with the last of them); then, of what is left, those below which the likelier ones already hold
        top_p, the lower of equally likely tokens counting as the likelier. Of the rest the highest score is drawn: logit /
        temperature plus noise that is a function of (seed, position, token) alone; a greedy row's scores are its logits.
        So a row's token depends neither on the batch around it nor on columns that would be dropped; and without
        filters, the best of the tokens drawn from parts of the vocabulary is the one drawn from all of it.
        """
        ...
