"""Affine: context parallelism of layers that carry a state over rows, each row changing it by an affine map. Every rank does its
chunks as if they began with nothing; what they would do to any state is sent along cp, and so is what a convolution sees of the
chunks before. Both have one size, whatever the length of the sequence. The recurrence itself is the gated_delta op's.

    state after a chunk = M @ state before it + U                       M [Dk, Dk], U [Dk, Dv]
    result of a row     = its result in a chunk alone + (its query @ M of the rows up to it) @ state before the chunk

Values, results and states here are wide, [... | Dv + Dk]: what comes of the values, and beside it what comes of the state before.
The op gives both at once where it begins with U = 0 and M = the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from trireme.parallel.collectives import Along
from trireme.parallel.zigzag import bounds


@dataclass(frozen=True)
class Pieces:
    """How a step's I items fall into chunks, and what this rank along cp has of them: two chunks of each item, also where they
    have no rows, which keeps what is sent of one size."""

    counts: np.ndarray  # int32 [2 I]: rows of this rank's chunks, item after item
    tails: tuple[torch.Tensor, torch.Tensor]  # int64 [t], [t]: rows that end this rank's chunks, and where they go in [2 I * (K - 1)]
    lefts: torch.Tensor  # int64 [2 I * (K - 1)]: what comes before this rank's chunks, as rows of all that is kept
    last: torch.Tensor  # int64 [I * (K - 1)]: and before each item's next row


class Scan:
    """One rank's part of a scan along cp: the states before its chunks, and after all, which every rank ends with."""

    def __init__(self, along: Along):
        self._along = along

    def plan(self, counts: np.ndarray, window: int, upload: Callable[[np.ndarray], torch.Tensor]) -> Pieces:
        """counts: int [I], whole items; window: the rows that a convolution sees before a row (K - 1); upload: to the device,
        without waiting for it. Made once a step."""
        num_ranks, place = self._along.size, self._along.place
        edges, mine = bounds(counts, num_ranks), [place, 2 * num_ranks - 1 - place]
        rows = np.diff(edges)[:, mine].reshape(-1)
        seen = windows(counts, num_ranks, window)

        ends = np.cumsum(rows)[:, None] - window + np.arange(window)  # the last rows of each chunk, if it has so many
        own = ends >= (np.cumsum(rows) - rows)[:, None]
        tails = ends[own], np.flatnonzero(own)
        took, put, lefts, last = (upload(each.reshape(-1)) for each in (*tails, seen[:, mine], seen[:, -1]))
        return Pieces(rows.astype(np.int32), (took, put), lefts, last)

    def halo(self, rows: torch.Tensor, before: torch.Tensor, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [N, C], a convolution's inputs in this rank's chunks; before [I, K - 1, C] each item's first row -> (the inputs
        before each of these chunks [2 I, K - 1, C], and before each item's next row [I, K - 1, C])."""
        num_items, window, channels = before.shape
        took, put = pieces.tails
        ends = rows.new_zeros(2 * num_items * window, channels).index_copy_(0, put, rows.index_select(0, took))
        every = self._in_order(ends.view(2 * num_items, window, channels))
        kept = torch.cat((before[None], every)).view(-1, channels)
        lefts, last = kept.index_select(0, pieces.lefts), kept.index_select(0, pieces.last)
        return lefts.view(2 * num_items, window, channels), last.view(num_items, window, channels)

    def states(self, done: torch.Tensor, initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """done float32 [2 I, H, Dk, Dv + Dk], what this rank's chunks make of any state; initial float32 [I, H, Dk, Dv]
        -> (the state before each of these chunks [2 I, H, Dk, Dv], and after each item [I, H, Dk, Dv])."""
        num_ranks, place = self._along.size, self._along.place
        every = compose(self._in_order(done), initial)
        return torch.stack((every[place], every[2 * num_ranks - 1 - place]), dim=1).flatten(0, 1), every[-1]

    def _in_order(self, mine: torch.Tensor) -> torch.Tensor:
        """[2 I, ...] of this rank's chunks -> [2 n, I, ...] of all, in the order of the sequence."""
        every = self._along.all_gather(mine, [len(mine)] * self._along.size)
        early, late = every.view(self._along.size, -1, 2, *mine.shape[1:]).unbind(2)
        return torch.cat((early, late.flip(0)))


def widened(values: torch.Tensor, key_dim: int) -> torch.Tensor:
    """[N, H, Dv] -> [N, H, Dv + Dk]: values of which nothing goes to M."""
    return F.pad(values, (0, key_dim))


def nothing_done(num_chunks: int, num_heads: int, key_dim: int, value_dim: int, device: torch.device) -> torch.Tensor:
    """What no rows do to a state: U = 0 and M = the identity, float32 [num_chunks, num_heads, Dk, Dv + Dk]."""
    identity = torch.cat((torch.zeros(key_dim, value_dim, device=device), torch.eye(key_dim, device=device)), dim=1)
    return identity.expand(num_chunks, num_heads, -1, -1).contiguous()


def compose(done: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """done [P, ..., Dk, Dv + Dk], chunk after chunk; initial [..., Dk, Dv] -> the states before each chunk and after all,
    [P + 1, ..., Dk, Dv]."""
    states = [initial]
    for added, turned in zip(*done.split([initial.shape[-1], initial.shape[-2]], dim=-1), strict=True):
        states.append(added + turned @ states[-1])
    return torch.stack(states)


def corrected(wide: torch.Tensor, states: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
    """wide [N, H, Dv + Dk], results of chunks alone; states float32 [P, H, Dk, Dv] before each of them; counts int [P], their
    rows -> results [N, H, Dv]. Chunk by chunk, since a state is larger than a row."""
    key_dim, value_dim = states.shape[2:]
    alone, by_state = wide.split([value_dim, key_dim], dim=-1)
    runs = zip(by_state.split(counts.tolist()), states, strict=True)
    carried = [torch.einsum("nhk,hkv->nhv", run.float(), state) for run, state in runs]
    return (alone + torch.cat(carried)).to(wide.dtype)


def windows(counts: np.ndarray, num_ranks: int, window: int) -> np.ndarray:
    """The last `window` rows before each chunk of each item, and before its next row: int64 [I, 2 n + 1, window], as numbers into
    [1 + 2 n, I, window]: what came before the item, and the last rows of each of its chunks, laid at the end of their places.

    One item of 5 rows a b c d e, 2 ranks, window 3; before it x y z. Chunks a | b | c | d e:

        kept      x y z   . . a   . . b   . . c   . d e
        windows   x y z   y z a   z a b   a b c   c d e
    """
    edges = bounds(counts, num_ranks)
    rows = edges[:, :, None] - window + np.arange(window)  # counted from the item's first
    chunks = (edges[:, None, None, 1:] <= rows[..., None]).sum(-1)  # of those rows; what is below 0 came before
    ends = np.take_along_axis(edges, np.minimum(chunks + 1, 2 * num_ranks).reshape(len(counts), -1), axis=1).reshape(chunks.shape)
    places = np.where(rows < 0, window + rows, window - ends + rows)
    parts, items = np.where(rows < 0, 0, chunks + 1), np.arange(len(counts))[:, None, None]
    return (parts * len(counts) + items) * window + places
