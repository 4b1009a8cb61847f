"""The two ends of a decoder with the vocabulary cut over ranks: what all ranks give is what one gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from layers.test_param import build
from trireme.core.batch import Batch
from trireme.layers.embed import Embed, Head
from trireme.layers.param import Param
from trireme.models.spec import Spec
from trireme.parallel.strips import Strips

HIDDEN = 12


def spec_of(vocab: int) -> Spec:
    return cast(Spec, SimpleNamespace(vocab_size=vocab, hidden=HIDDEN, zero_centred=False))


def batch_of(tokens: torch.Tensor) -> Batch:
    return Batch(tokens, tokens, tokens, None, None, [])


def fill(param: Param, whole: torch.Tensor) -> None:
    [piece] = param.pieces((0,))
    param.data.copy_(whole[piece.source])


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize(("vocab", "num_ranks"), [(251, 1), (251, 4), (50, 3), (5, 4), (3, 4)])
def test_parts_of_the_embedding_sum_to_it(vocab: int, num_ranks: int, num_tokens: int):
    whole, tokens = torch.randn(vocab, HIDDEN), torch.randint(0, vocab, (num_tokens,))
    summed = torch.zeros(num_tokens, HIDDEN)
    for rank in range(num_ranks):
        embed = Embed(build(spec_of(vocab), rank, tp=num_ranks))
        fill(embed.weight, whole)
        summed += embed(batch_of(tokens))
    assert torch.equal(summed, F.embedding(tokens, whole))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 6])
@pytest.mark.parametrize(("vocab", "num_ranks"), [(251, 1), (251, 4), (5, 4), (3, 4)])
def test_columns_of_the_head_beside_each_other_are_it(vocab: int, num_ranks: int, num_rows: int, tied: bool):
    whole, x = torch.randn(vocab, HIDDEN), torch.randn(9, HIDDEN)
    head_rows = torch.randperm(9)[:num_rows]
    columns = []
    for rank in range(num_ranks):
        own = build(spec_of(vocab), rank, tp=num_ranks)
        embed = Embed(own)
        head = Head(own, tied=embed.weight if tied else None)
        fill(head.proj.weight, whole)
        head.proj.prepare()
        columns += head(Strips.of(x).with_onward(head_rows), batch_of(head_rows))
    assert all(part.dtype == torch.float32 for part in columns)
    torch.testing.assert_close(torch.cat(columns, dim=1), x[head_rows] @ whole.T, atol=1e-5, rtol=1e-5)
