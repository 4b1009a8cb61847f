"""penalise against transformers' repetition penalty and OpenAI's definition of the other two."""

from __future__ import annotations

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from trireme_kernels.choose import Choices

PROMPTS = torch.tensor([[3, 3, 5, 9], [0, 1, 2, 19]])
OUTPUTS = torch.tensor([[5, 5, 5, 7], [4, 4, 19, 6]])
VOCAB = 20


def penalise(logits, repetition, presence, frequency):
    mask = torch.zeros(2, VOCAB, dtype=torch.bool).scatter_(1, PROMPTS, True)
    counts = torch.zeros(2, VOCAB, dtype=torch.int32).scatter_add_(1, OUTPUTS, torch.ones_like(OUTPUTS, dtype=torch.int32))
    return Choices("cpu", torch.float32)("penalise")(logits, mask, counts, *map(torch.tensor, (repetition, presence, frequency)))


def test_repetition_is_transformers():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    found = penalise(logits.clone(), [1.3, 0.8], [0.0, 0.0], [0.0, 0.0])
    for row, penalty in enumerate((1.3, 0.8)):
        seen = torch.cat((PROMPTS, OUTPUTS), dim=1)[row : row + 1]
        torch.testing.assert_close(found[row : row + 1], RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[row : row + 1].clone()))


def test_presence_and_frequency_are_openais():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, counts over the output alone."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = logits.clone()
    for row, (presence, frequency) in enumerate(((0.5, 0.25), (-1.0, 2.0))):
        for token, count in zip(*OUTPUTS[row].unique(return_counts=True), strict=True):
            expected[row, token] -= count * frequency + presence
    torch.testing.assert_close(penalise(logits, [1.0, 1.0], [0.5, -1.0], [0.25, 2.0]), expected)


def test_ones_and_zeros_change_nothing_and_banned_stays_banned():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[:, 5] = -torch.inf
    before = logits.clone()
    assert torch.equal(penalise(logits, [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]), before)
    assert penalise(logits, [0.5, 2.0], [-2.0, 2.0], [1.0, 1.0])[:, 5].isneginf().all()
    assert torch.equal(logits, before), "inputs are left alone"
