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
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)  # torch keeps it from reuse until it is copied
    for place, array in zip(unpack(host, starts, arrays), arrays, strict=True):
        place.numpy()[...] = array
    return unpack(host.to(device, non_blocking=True), starts, arrays)


def unpack(packed: torch.Tensor, starts: Sequence[int], arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of bytes uint8 [B] as tensors like the arrays, each from its start."""
    kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    return [
        packed[start : start + array.nbytes].view(kind).view(array.shape) for start, array, kind in zip(starts, arrays, kinds, strict=False)
    ]


def download(x: torch.Tensor) -> torch.Tensor:
    """x in host memory, to be read once the device has come so far (see Stopwatch.wait)."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
