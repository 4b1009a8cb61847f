"""Fit: what each term of a step's time costs, from steps that were measured. Arithmetic only."""

from __future__ import annotations

import numpy as np

_ODD = 6.0  # median deviations, beyond which a step is left out: it compiled a kernel, or the machine did something else


def fit(samples: np.ndarray) -> np.ndarray:
    """[n, terms + 1], a step's seconds behind its terms -> seconds of one of each term, none below zero: least squares, again without
    the steps that it says were odd."""
    terms, seconds = samples[:, :-1], samples[:, -1]
    deviations = np.abs(terms @ _least_squares(terms, seconds) - seconds)
    usual = deviations <= _ODD * max(np.median(deviations), 1e-9)
    return _least_squares(terms[usual], seconds[usual])


def _least_squares(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """A term that comes out negative is left out, the most negative first, and the rest fitted again."""
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-30)
    kept, costs = list(range(terms.shape[1])), np.zeros(terms.shape[1])
    while kept:
        found = np.linalg.lstsq(terms[:, kept] / scale[kept], seconds, rcond=None)[0]
        if found.min() >= 0:
            costs[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return costs
