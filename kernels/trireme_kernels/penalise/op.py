"""Signature of penalise."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Penalise(Protocol):
    """Sizes a case may name: vocab."""

    def __call__(
        self, logits: Tensor, prompt_mask: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
    ) -> Tensor:
        """logits float [n, V], prompt_mask bool [n, V], output_counts integer [n, V] (times each token was sampled),
        repetition, presence and frequency float [n] (1, 0, 0 change nothing) -> logits [n, V], new.

        First repetition, as transformers and vLLM have it: the logit of a token in prompt or output is divided by the
        penalty if positive, else multiplied. Then OpenAI's two, over the output alone: minus frequency * count, minus
        presence where the count is not 0.
        """
        ...
