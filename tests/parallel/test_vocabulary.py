"""Logits cut over ranks answer as whole ones, on every rank alike, ties and short cuts included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cut_logits import on_cut, uncut
from trireme.parallel.vocabulary import CutLogits, highest


def made(num_rows: int, vocab: int, seed: int, ties: bool) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


def sorted_whole(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def answers(part: CutLogits, k: int, tokens: torch.Tensor) -> list[torch.Tensor]:
    """All that can be asked."""
    return [part.argmax(), *part.topk(k), part.full(), part.at(tokens), part.num_above(part.at(tokens)), part.logsumexp()]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3, 4, 5, 50, 251]), st.integers(0, 4), st.integers(0, 999), st.booleans(), st.data())
def test_parts_answer_as_the_whole(num_ranks, vocab, num_rows, seed, ties, data):
    logits = made(num_rows, vocab, seed, ties)
    k = data.draw(st.integers(0, vocab))
    tokens = torch.randint(0, vocab, (num_rows,), generator=torch.Generator().manual_seed(seed))
    chosen = logits.gather(1, tokens[:, None])
    expected = [logits.argmax(-1), *sorted_whole(logits, k), logits, chosen[:, 0], (logits > chosen).sum(-1)]
    everyone = on_cut(logits, num_ranks, lambda part: answers(part, k, tokens))
    for *exact, mass in everyone:
        assert all(torch.equal(found, true) for found, true in zip(exact, expected, strict=True))
        assert torch.equal(mass, everyone[0][-1]), "every rank has the same bits"
        torch.testing.assert_close(mass, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_selected_rows_answer_alone():
    logits = made(6, 50, 0, ties=True)
    for found in on_cut(logits, 4, lambda part: (part.select(slice(1, 4)).argmax(), part.select(torch.tensor([5, 0])).full())):
        assert torch.equal(found[0], logits[1:4].argmax(-1))
        assert torch.equal(found[1], logits[[5, 0]])


def test_one_rank_copies_nothing():
    logits = made(6, 50, 0, ties=False)
    part = uncut(logits)
    assert part.full() is logits
    assert part.select(slice(2, 4)).local.data_ptr() == logits[2:].data_ptr()


@given(st.integers(1, 40), st.integers(0, 999), st.data())
def test_highest_takes_the_lowest_of_equals(width, seed, data):
    x = torch.randint(-2, 3, (5, width), generator=torch.Generator().manual_seed(seed)).float()
    x[x == -2] = -torch.inf
    k = data.draw(st.integers(0, width))
    for found, true in zip(highest(x, k), sorted_whole(x, k), strict=True):
        assert torch.equal(found, true)
