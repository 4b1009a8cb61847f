"""Staging: numbers of a step between host memory and the device. Neither way waits for what the device still has to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN = 64  # bytes: a Triton-language kernel is compiled once more for an address that is less aligned


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on the device, by one copy for all of them. On a CPU they share memory where they can."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays]
    starts = np.cumsum([0, *sizes])
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=True)  # torch keeps it from reuse until it is copied
    here = [host[start : start + array.nbytes].numpy().view(array.dtype) for start, array in zip(starts, arrays, strict=False)]
    for place, array in zip(here, arrays, strict=True):
        place[:] = array
    there = host.to(device, non_blocking=True)
    return [there[start : start + place.nbytes].view(torch.from_numpy(place).dtype) for start, place in zip(starts, here, strict=False)]


def download(x: torch.Tensor) -> torch.Tensor:
    """x in host memory, to be read once the device has come so far (see Stopwatch.wait)."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
