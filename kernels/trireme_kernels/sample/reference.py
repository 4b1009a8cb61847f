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
    logits: Tensor,  # [n, C]
    temperature: Tensor,  # [n]
    top_k: Tensor,  # [n]
    top_p: Tensor,  # [n]
    min_p: Tensor,  # [n]
    seeds: Tensor,  # [n]
    positions: Tensor,  # [n]
    ids: Tensor | None = None,  # [1 or n, C]
) -> tuple[Tensor, Tensor]:  # [n], [n]
    scores, columns = logits.max(dim=-1)
    num_rows, width = logits.shape
    if ids is None:
        ids = torch.arange(width, device=logits.device).unsqueeze(0)
    tokens = ids.expand(num_rows, width)  # a view: nothing is written out for the whole vocabulary
    drawn = temperature > 0
    filtered = drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    for rows in (drawn & ~filtered).nonzero().squeeze(1).split(max(1, _CACHED // width)):
        noise = gumbel(seeds[rows], positions[rows], ids if len(ids) == 1 else ids[rows])
        scores[rows], columns[rows] = noise.add_(logits[rows] / temperature[rows, None]).max(dim=-1)
    rows = filtered.nonzero().squeeze(1)
    least = max(_CANDIDATES, 2 * int(top_k.max())) if len(rows) else 0
    for num in (least, 16 * least, width):
        if not len(rows):
            break
        # The few likeliest nearly always contain all that survive; rows where they do not are done again with more.
        kept, at, complete = survivors(logits[rows] / temperature[rows, None], top_k[rows], top_p[rows], min_p[rows], num)
        scores[rows], winner = (kept + gumbel(seeds[rows], positions[rows], tokens[rows[:, None], at])).max(dim=-1)
        columns[rows] = at.gather(1, winner[:, None]).squeeze(1)
        rows = rows[~complete]
    return tokens.gather(1, columns[:, None]).squeeze(1), scores


def survivors(
    logits: Tensor,  # [n, C], scaled by temperature
    top_k: Tensor,  # [n]
    top_p: Tensor,  # [n]
    min_p: Tensor,  # [n]
    num: int,  # candidates to look at
) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` likeliest columns of each row, likeliest first and of equals the lower: (their logits, -inf where dropped
    [n, K], columns [n, K], whether that row's survivors are all among them [n]).

    Every filter drops a tail of the sorted row, so if the last candidate is dropped and no survivor equals it, all columns
    beyond are dropped too. What is summed is summed from the likeliest on, so candidates that are dropped change no bit.
    """
    whole = num >= logits.shape[1]
    if whole:
        candidates, columns = logits.sort(dim=-1, descending=True, stable=True)
    else:
        columns = logits.topk(num, dim=-1).indices.sort(dim=-1).values  # so that the stable sort puts the lower of equals first
        candidates, order = logits.gather(1, columns).sort(dim=-1, descending=True, stable=True)
        columns = columns.gather(1, order)
    num, best = candidates.shape[1], candidates[:, :1]
    kth = candidates.gather(1, torch.where(top_k > 0, top_k, num).clamp(1, num).long()[:, None] - 1)
    values = candidates.masked_fill((candidates < best + min_p[:, None].log()) | ((top_k > 0)[:, None] & (candidates < kth)), -torch.inf)
    cut = values[:, -1].isneginf()  # min_p and top_k were decided within the candidates
    weights = (values - best).exp()
    held = weights.cumsum(dim=-1)
    mass = torch.where(cut, held[:, -1], (logits.logsumexp(dim=-1) - best[:, 0]).exp())
    dropped = (held - weights >= (top_p * mass)[:, None]) & (top_p < 1)[:, None]
    dropped[:, 0] = False
    values = values.masked_fill(dropped, -torch.inf)
    undecided = ~cut & ((top_k > 0) | (min_p > 0))
    beyond = candidates[:, -1] < candidates.masked_fill(values.isneginf(), torch.inf).amin(dim=-1)
    return values, columns, (beyond & ~undecided) | whole
