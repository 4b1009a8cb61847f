"""Trials: steps that mean nothing, of every kind for which a kernel in the Triton language is compiled anew, and every way to sample. A
rank that has passed them has compiled all that a request can ask of it. Which sizes make a difference the kernels decide: number of
rows, of items, of sampled rows, each up to the next power of two, and where in memory an item's first row begins. And numbers of rows
for products by cuBLAS, whose kernels are compiled but not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from trireme.core.request import Sampling
from trireme.core.step import Regime
from trireme.ranks.regimes import spread

_LONG = 17  # rows that layers with states take chunk by chunk, and the fewest: what such an item stands beside goes row by row
_PLACES = 8  # after so many rows one begins where another did, seen in pieces of 16 bytes
_COME = 512  # more rows of a slot than any kernel tells apart
_SAMPLED = 64  # more sampled rows of one item than any kernel tells apart
_EACH, _LEAST_STEP, _PARTS = 256, 7, 128  # rows up to which each number is tried; then by so many, or by one part in so many

GREEDY, DRAWN = Sampling(max_tokens=1, temperature=0.0), Sampling(max_tokens=1)
SAMPLINGS = (
    GREEDY,
    DRAWN,
    Sampling(max_tokens=1, top_p=0.9),
    Sampling(max_tokens=1, top_p=0.9, top_k=2),  # drawn from three candidates where ranks share a vocabulary
    Sampling(max_tokens=1, top_p=0.9, top_k=15),  # likewise from 16
    Sampling(max_tokens=1, top_k=20, min_p=0.05),
    Sampling(max_tokens=1, repetition_penalty=1.1, logit_bias={0: 1.0}, bad_words=((0,),), logprobs=2),
)


class Trial(NamedTuple):
    counts: np.ndarray  # int32 [items], rows of each
    regime: Regime = Regime()
    samples: int = 1  # of each item's last rows
    holds: bool = False  # rows are a token and drafts each, after others that stand


def trials(
    largest: Iterable[tuple[np.ndarray, Regime]], *, most_items: int, most_drafting: int, max_len: int, num_held: int, cp: int, mixes: bool
) -> Iterator[Trial]:
    """`largest`: of each regime, as largest_steps says; `most_drafting`: items with drafts, which have `num_held` rows each; `mixes`:
    whether layers take long and short items of one step differently."""
    for counts, regime in largest:
        most = int(counts.sum())
        for num_rows in _doubled(2 * cp if regime.cp else 1, most):
            num_items = -(-num_rows // max_len)
            yield Trial(spread(num_rows, num_items), regime, samples=min(num_rows, _SAMPLED) if num_items == 1 else 1)
        if regime.cp:
            continue
        for num_items in _doubled(1, min(most_items, most)):
            yield Trial(np.ones(num_items, np.int32), regime)
        for num_items in _doubled(1, min(most_drafting, most // num_held)) if num_held else ():
            yield Trial(np.full(num_items, num_held, np.int32), regime, samples=num_held, holds=True)
        for place in range(1, 1 + _PLACES) if mixes else ():
            yield from (Trial(counts, regime) for counts in _mixed(place, most_items, most))


def arrivals(most_rows: int, num_slots: int, top_k: int) -> Iterator[int]:
    """Rows that may be dispatched to a rank that has so many slots."""
    return _doubled(1, min(most_rows * top_k, _COME * max(8, num_slots)))


def tiles(most_rows: int) -> list[int]:
    """Numbers of rows for which cuBLAS chooses most of the kernels that it has for up to `most_rows`. One is loaded when it is first
    launched, and whoever does that waits until the device has nothing left to do. Which one it is changes with every few rows, in the
    qkv of Qwen3-8B between 85 up to 8192 rows: hence all numbers up to 256, then steps of odd numbers, so that all remainders come.
    The largest is first: its memory does for all."""
    found, num_rows = [most_rows], 1
    while num_rows < most_rows:
        found.append(num_rows)
        num_rows += 1 if num_rows < _EACH else max(_LEAST_STEP, num_rows // _PARTS | 1)
    return sorted(found, reverse=True)


def _mixed(place: int, most_items: int, most_rows: int) -> Iterator[np.ndarray]:
    """A long item from row `place` on; short ones, one and many, from the row after a long one on that is as far from a multiple of 8."""
    if most_items > 1 and place + _LONG <= most_rows:
        yield np.array([place, _LONG], np.int32)
    long = _LONG - 1 + place
    room = min(most_items - 1, most_rows - long)
    yield from (np.array([long] + [1] * after, np.int32) for after in sorted({1, room}) if 0 < after <= room)


def _doubled(least: int, most: int) -> Iterator[int]:
    """Numbers up to `most`, itself included, each twice the one before."""
    while least < most:
        yield least
        least *= 2
    if most:
        yield most
