"""Zig-zag: how context parallelism cuts each prompt's rows, so that causal attention is equal work for every rank. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Chunks(NamedTuple):
    """Runs of rows of a step's items, in the order in which a rank has them."""

    items: np.ndarray  # int64 [C]: the item that a chunk is of
    begins: np.ndarray  # int64 [C]: its first row, counted from the item's first
    counts: np.ndarray  # int64 [C], above zero


def zigzag(counts: np.ndarray, num_ranks: int, rank: int) -> Chunks:
    """The chunks of one rank. Each item is cut into 2 n parts as equal as can be; rank r has parts r and 2n - 1 - r, an early one
    and a late one, so that what its queries see adds up to the same for every r (Megatron, Llama 3; facts/seeds.md 3).

        8 rows, 2 ranks    rank 0: 0 1 . . . . 6 7
                           rank 1: . . 2 3 4 5 . .
    """
    edges, parts = bounds(counts, num_ranks), np.array([rank, 2 * num_ranks - 1 - rank])
    begins, ends = edges[:, parts].ravel(), edges[:, parts + 1].ravel()
    items = np.repeat(np.arange(len(counts)), 2)
    real = ends > begins
    return Chunks(items[real], begins[real], (ends - begins)[real])


def bounds(counts: np.ndarray, num_ranks: int) -> np.ndarray:
    """Where the 2 n parts of each item begin, and its end: int64 [I, 2 n + 1], counted from its first row."""
    return counts.astype(np.int64)[:, None] * np.arange(2 * num_ranks + 1) // (2 * num_ranks)


def whole(counts: np.ndarray) -> Chunks:
    """Every item in one chunk."""
    return Chunks(np.arange(len(counts)), np.zeros(len(counts), np.int64), counts.astype(np.int64))


def chunks_of(rows: np.ndarray, counts: np.ndarray) -> Chunks:
    """Rows of the step in any order, int64 [N], as the longest chunks that have them in this order."""
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    items = np.searchsorted(firsts, rows, side="right") - 1
    edges = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(items, prepend=-1) != 0))
    return Chunks(items[edges], (rows - firsts[items])[edges], np.diff(edges, append=len(rows)))


def rows_of(chunks: Chunks, counts: np.ndarray) -> np.ndarray:
    """Rows of the step, item after item, that the chunks are: int64 [sum of their counts]."""
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    begins = firsts[chunks.items] + chunks.begins
    ahead = np.cumsum(chunks.counts) - chunks.counts
    return np.arange(int(chunks.counts.sum())) + np.repeat(begins - ahead, chunks.counts)
