"""Chunks: how many rows of a long prompt go into one step of a pipeline, so that every chunk takes equally long. Arithmetic
only; which prompt's rows they are is the scheduler's matter."""

from __future__ import annotations

from collections import deque
from math import sqrt
from typing import NamedTuple

import numpy as np

from trireme.core.step import PAGE
from trireme.engine.fit import fit

_ALIGN = 64  # rows: chunks are whole pages, and whole tiles of attention and delta kernels
_SMOOTH = 0.75  # how far a chunk goes from the usual size to the exact one
_LEAST_SAMPLES = 8  # below, nothing is fitted
_MOST_SAMPLES = 256  # the latest
_FIT_EVERY = 16  # samples: a fit takes as long as planning three steps


class ChunkCost(NamedTuple):
    """Seconds of a step with x rows of a prompt that has L rows before them: pair (x^2 + 2 L x) + row x + prefix L + step.

    `pair`: attention, where x rows see L rows and half of one another. `prefix`: what is done anew for every row before, as where
    latent keys are expanded. Models whose cost is linear have pair = 0.
    """

    pair: float
    row: float
    prefix: float = 0.0
    step: float = 0.0


def chunk_rows(cost: ChunkCost, start: int, usual: int) -> int:
    """Rows of the chunk at position `start` that takes as long as `usual` rows at position 0, smoothed, whole tiles, at most
    `usual` and at least a quarter of it.

    The positive root of pair x^2 + (2 pair L + row) x = T; SGLang's dynamic chunk sizer, whose numbers for pair = 1e-6,
    row = 0.01, usual = 4096 are 4096, 2496, 1536, 1152 at 0, 8192, 32768, 131072. Stable also where pair is 0.
    """
    budget = cost.pair * usual * usual + cost.row * usual - cost.prefix * start
    slope = 2 * cost.pair * start + cost.row
    root = slope + sqrt(max(0.0, slope * slope + 4 * cost.pair * budget))
    exact = 2 * budget / root if root > 0 else usual
    smooth = usual + _SMOOTH * (exact - usual)
    rows = int(min(usual, max(smooth, usual / 4)))
    return max(rows // _ALIGN * _ALIGN, min(usual, _ALIGN))


class ChunkSizer:
    """Fits a ChunkCost to steps that have been measured, anew now and then: least squares over the latest, no term below zero."""

    def __init__(self, usual: int):
        self._usual = usual  # rows of a step
        self._samples: deque[tuple[float, float, float, float, float]] = deque(maxlen=_MOST_SAMPLES)
        self._cost: ChunkCost | None = None
        self._num_new = 0  # samples since it was fitted

    def learn(self, starts: np.ndarray, counts: np.ndarray, seconds: float) -> None:
        """A step with items of `counts` rows from positions `starts` kept its slowest stage busy for so long. Chunks are those of more
        than a page: a row that decodes costs by other rules, and beside a chunk it is a part of what the step costs."""
        chunks = counts > PAGE
        starts, counts = starts[chunks].astype(np.float64), counts[chunks].astype(np.float64)
        if counts.sum() < _ALIGN:
            return
        pairs = (counts * counts + 2 * starts * counts).sum()
        self._samples.append((pairs, counts.sum(), starts.sum(), 1.0, seconds))
        self._num_new += 1

    def rows(self, start: int) -> int:
        """Rows of the next chunk of a prompt of which `start` rows are behind; the usual number while too little is known."""
        if len(self._samples) < _LEAST_SAMPLES:
            return self._usual
        if self._cost is None or self._num_new >= _FIT_EVERY:
            self._cost, self._num_new = ChunkCost(*fit(np.array(self._samples)).tolist()), 0
        return chunk_rows(self._cost, start, self._usual)
