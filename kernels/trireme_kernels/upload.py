"""Numbers made on the CPU, to a device, without waiting for what the device still has to do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: str | torch.device) -> Tensor:
    """A copy on the device, made in the stream's order. From page-locked memory, since of anything longer than 64 KiB in
    other memory CUDA waits for the stream; torch keeps the page-locked block from reuse until it is copied."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
