"""sample: filters against transformers' warpers, draws against the softmax they should follow, and no row feels its batch."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trireme_kernels.case import Case
from trireme_kernels.choose import Choices, build, misfit
from trireme_kernels.sample.noise import gumbel
from trireme_kernels.sample.reference import survivors

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def sample(logits, seeds, positions, **settings):
    """Settings are numbers for all rows, or one for each."""
    rows = len(logits)
    types = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
    columns = [torch.as_tensor({**PLAIN, **settings}[name], dtype=kind).expand(rows) for name, kind in types.items()]
    return Choices("cpu", torch.float32)("sample")(logits, *columns, seeds, positions)[0]


def warped(logits, temperature, top_k, top_p, min_p):
    """vLLM's order, with transformers' warpers."""
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if min_p > 0:
        logits = MinPLogitsWarper(min_p)(None, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 300, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (0.6, 0, 0.9, 0.0),
    (3.0, 0, 0.95, 0.0),  # thousands survive: more than the first candidates
    (1.5, 0, 1e-6, 0.0),
    (1.3, 0, 1.0, 0.1),
    (5.0, 0, 1.0, 0.05),
    (4.0, 0, 0.8, 0.05),
    (0.9, 40, 0.8, 0.02),
    (2.0, 700, 0.99, 0.001),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num", [64, 256, 1500, 3000])
def test_survivors_are_those_of_transformers(settings, num):
    temperature, top_k, top_p, min_p = settings
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(5)) * 3
    expected = warped(logits.clone(), *settings)
    filled = [torch.full((6,), value) for value in (top_k, top_p, min_p)]
    kept, ids, complete = survivors(logits / temperature, *filled, num)
    found = torch.full_like(logits, -torch.inf).scatter_(1, ids, kept)
    if num == 3000:
        assert complete.all()
    # What is claimed to be complete is the exact set; rows that are not claimed are done again by `sample`.
    assert torch.equal(found[complete].isneginf(), expected[complete].isneginf())
    if (~expected.isneginf()).sum(dim=-1).max() < num // 4 and (top_k == 0 or top_k < num):
        assert complete.all(), "few survivors need no second look"


def test_ties_at_the_last_of_top_k_survive():
    logits = torch.zeros(1, 600)
    logits[0, 7] = 1.0
    filled = torch.tensor([3]), torch.ones(1), torch.zeros(1)
    assert not survivors(logits, *filled, 256)[2].any(), "ties go on beyond the candidates"
    kept, _, complete = survivors(logits, *filled, 600)
    assert complete.all() and not kept.isneginf().any()
    draws = sample(logits.expand(4000, -1), torch.arange(4000), torch.zeros(4000, dtype=torch.int64), top_k=3)
    assert len(draws.unique()) > 500


@pytest.mark.parametrize("settings", [*SETTINGS[:5], SETTINGS[10]])
def test_draws_follow_the_distribution(settings):
    """Chi-square of 20000 seeds over 30 tokens: below the 1e-4 tail (mean + 6 standard deviations)."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(9)) * 2
    temperature, top_k, top_p, min_p = settings
    num = 20000
    draws = sample(
        logits.expand(num, -1), torch.arange(num), torch.full((num,), 17), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    expected = warped(logits.clone(), *settings).softmax(dim=-1)[0].double() * num
    counts = draws.bincount(minlength=30).double()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[often].sum()
    freedom = max(int(often.sum()) - 1, 1)
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_noise_is_gumbel_and_uncorrelated(vary):
    """Mean 0.5772, variance pi^2 / 6; rows of neighbouring seeds or positions, and neighbouring tokens, are independent."""
    index, zero = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    seeds, positions = (index, zero) if vary == "seeds" else (zero, index)
    noise = gumbel(seeds, positions, torch.arange(500)[None])
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 0.006
    assert abs(noise.var() - 1.64493) < 0.015
    centred = (noise - noise.mean()) / noise.std()
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.005
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.005
    assert (centred.T @ centred / 2000).fill_diagonal_(0).abs().max() < 0.15


def test_row_does_not_feel_its_batch():
    draw = torch.Generator().manual_seed(1)
    rows, vocab = 24, 2000
    logits = torch.randn(rows, vocab, generator=draw) * 4
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,), generator=draw), torch.randint(0, 9999, (rows,), generator=draw)
    settings = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 2.0]).repeat(6),
        "top_k": torch.tensor([0, 40, 0]).repeat(8),
        "top_p": torch.tensor([1.0, 0.9, 0.95, 1.0, 0.5, 1.0]).repeat(4),
        "min_p": torch.tensor([0.0] * 6 + [0.1, 0.0]).repeat(3),
    }
    together = sample(logits, seeds, positions, **settings)
    shuffled = torch.randperm(rows, generator=draw)
    part = {name: column[shuffled] for name, column in settings.items()}
    assert torch.equal(sample(logits[shuffled], seeds[shuffled], positions[shuffled], **part), together[shuffled])
    for row in range(rows):
        one = slice(row, row + 1)
        assert sample(logits[one], seeds[one], positions[one], **{name: column[one] for name, column in settings.items()}) == together[row]
    assert torch.equal(together[::4], logits[::4].argmax(dim=-1)), "temperature 0 is greedy"


def test_filters_that_drop_nothing_draw_as_none():
    """One noise for a token, whichever way it is drawn: a filter that keeps all cannot change the draw."""
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(2))
    seeds, positions = torch.arange(50), torch.arange(50) * 3
    plain = sample(logits, seeds, positions)
    assert torch.equal(plain, sample(logits, seeds, positions, top_k=700))
    assert torch.equal(plain, sample(logits, seeds, positions, min_p=1e-30))


def test_draws_from_columns_are_those_from_all():
    """Without filters the best draw of several parts is the draw from all; with top_k the highest columns are enough."""
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(6)).mul_(8).round_().div_(4)
    seeds, positions, ones = torch.arange(50), torch.arange(50) * 7, torch.ones(50)
    op, zeros = Choices("cpu", torch.float32)("sample"), torch.zeros(50)
    for temperature in (zeros, ones * 0.8):
        free = temperature, zeros.long(), ones, zeros, seeds, positions
        tokens, scores = op(logits, *free)
        parts = [op(logits[:, part], *free, part[None]) for part in torch.arange(700).split(250)]
        best = torch.stack([score for _, score in parts]).max(dim=0)
        assert torch.equal(best.values, scores)
        assert torch.equal(torch.stack([token for token, _ in parts]).gather(0, best.indices[None])[0], tokens)
    few = ones * 0.8, torch.full((50,), 40), ones * 0.7, zeros, seeds, positions
    columns = (logits >= logits.topk(40).values[:, -1:]).float().topk(100).indices.sort().values
    assert torch.equal(op(logits.gather(1, columns), *few, columns)[0], op(logits, *few)[0])


def test_narrow_settings_are_greedy_and_bans_hold():
    logits = torch.randn(40, 900, generator=torch.Generator().manual_seed(4))
    seeds, positions = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    best = logits.argmax(dim=-1)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5}):
        assert torch.equal(sample(logits, seeds, positions, **settings), best)
    allowed = torch.arange(40) * 7
    banned = torch.full_like(logits, -torch.inf)
    banned[torch.arange(40), allowed] = logits[torch.arange(40), allowed]
    for settings in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}):
        assert torch.equal(sample(banned, seeds, positions, **settings), allowed)


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert sample(torch.empty(0, 10), empty, empty).shape == (0,)


@pytest.mark.parametrize("vocab", [900, 3000])
@pytest.mark.parametrize("kind", ["plain", "ties", "bans", "parts"])
def test_the_kernel_draws_the_same_tokens(kind, vocab):
    """Every mix of filters, on rows with many equals (which of them survive top_p is part of the definition) or bans; the
    same noise, bit for bit but for what logarithms round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(device, torch.float32, {"vocab": vocab})
    reason = misfit("sample", "tl", case, forced=True)
    if reason is not None:
        pytest.skip(reason)
    draw, rows = torch.Generator().manual_seed(vocab), 24  # each mix of the settings below once
    logits = torch.randn(rows, vocab, generator=draw) * 4
    if kind == "ties":
        logits = logits.mul_(2).round_().div_(2)
    if kind == "bans":
        logits[:, ::3] = -torch.inf
    given = [
        logits,
        torch.tensor([0.0, 0.7, 1.0, 2.0]).repeat(rows // 4),
        torch.tensor([0, 40, 0]).repeat(rows // 3),
        torch.tensor([1.0, 0.9, 0.95, 1.0, 0.5, 1.0]).repeat(rows // 6),
        torch.tensor([0.0] * 6 + [0.1, 0.0]).repeat(rows // 8),
        torch.randint(-(2**62), 2**62, (rows,), generator=draw),
        torch.randint(0, 9999, (rows,), generator=draw),
        torch.randint(1, 5, (rows, vocab), generator=draw).cumsum(dim=-1) if kind == "parts" else None,
    ]
    expected = build("sample", "reference", Case("cpu", torch.float32))(*given)
    found = build("sample", "tl", case)(*(x if x is None else x.to(device) for x in given))
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-5, rtol=1e-5)
