"""sample in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.sample.noise import gumbel
from trireme_kernels.sample.op import Sample

_CANDIDATES = 256  # finding this many of 49152 costs a thirtieth of sorting them all (measured on a CPU)
_CACHED = 1 << 18  # numbers handled at a time where a row needs noise for its whole vocabulary


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> Sample:
    return sample


def sample(
    logits: Tensor,  # [n, V]
    temperature: Tensor,  # [n]
    top_k: Tensor,  # [n]
    top_p: Tensor,  # [n]
    min_p: Tensor,  # [n]
    seeds: Tensor,  # [n]
    positions: Tensor,  # [n]
) -> Tensor:  # [n]
    tokens = logits.argmax(dim=-1)
    drawn = temperature > 0
    if not drawn.any():
        return tokens
    filtered = drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    vocab = logits.shape[1]
    everything = torch.arange(vocab, device=logits.device).unsqueeze(0)
    for rows in (drawn & ~filtered).nonzero().squeeze(1).split(max(1, _CACHED // vocab)):
        noise = gumbel(seeds[rows], positions[rows], everything)
        tokens[rows] = noise.add_(logits[rows] / temperature[rows, None]).argmax(dim=-1)
    rows = filtered.nonzero().squeeze(1)
    least = max(_CANDIDATES, 2 * int(top_k.max()))
    for num in (least, 16 * least, vocab):
        if not len(rows):
            break
        # The few likeliest nearly always contain all that survive; rows where they do not are done again with more.
        kept, ids, complete = survivors(logits[rows] / temperature[rows, None], top_k[rows], top_p[rows], min_p[rows], num)
        winner = (kept + gumbel(seeds[rows], positions[rows], ids)).argmax(dim=-1, keepdim=True)
        tokens[rows] = ids.gather(1, winner).squeeze(1)
        rows = rows[~complete]
    return tokens


def survivors(
    logits: Tensor,  # [n, V], scaled by temperature
    top_k: Tensor,  # [n]
    top_p: Tensor,  # [n]
    min_p: Tensor,  # [n]
    num: int,  # candidates to look at
) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` likeliest tokens of each row, likeliest first: (their logits, -inf where dropped [n, K], ids [n, K],
    whether that row's survivors are all among them [n]).

    Every filter drops a tail of the sorted row, so if the last candidate is dropped, all tokens beyond are too.
    """
    num = min(num, logits.shape[1])
    values, ids = logits.topk(num, dim=-1)
    least = values[:, :1] + min_p[:, None].log()
    kth = values.gather(1, torch.where(top_k > 0, top_k, num).clamp(1, num).long()[:, None] - 1)
    values = values.masked_fill((values < least) | ((top_k > 0)[:, None] & (values < kth)), -torch.inf)
    cut = values[:, -1].isneginf()  # min_p and top_k were decided within the candidates
    mass = torch.where(cut, values.logsumexp(dim=-1), logits.logsumexp(dim=-1))
    probability = (values - mass[:, None]).exp()
    above = probability.cumsum(dim=-1) - probability  # what likelier tokens hold
    dropped = (above >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped[:, 0] = False
    values = values.masked_fill(dropped, -torch.inf)
    whole = num == logits.shape[1]
    undecided = ~cut & ((top_k > 0) | (min_p > 0))
    return values, ids, (values[:, -1].isneginf() & ~undecided) | whole
