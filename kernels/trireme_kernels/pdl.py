"""Programmatic dependent launch (PDL): a kernel whose programs start while the kernel before it on the stream still runs.

    without     norm |-----|      linear   |-------------|       silu   |--|
    with        norm |-----|      silu         |wait ..........|--|
             linear |wait..|-------------|

A kernel launched so orders itself: before it reads what kernels wrote, and before it writes anything, since earlier ones may
still read there, every program of it waits (`after_earlier`) until the kernel before it is done and its writes are seen.
That one waited for its own predecessor, and so on: whoever waits comes after all that is earlier, as on any stream. A program
that ends without waiting is sound only beside one that waits, for a kernel is done when all of its programs are.
Kernels launched plainly (torch's, NCCL's), copies and events come after all that is earlier, and what comes after them
starts when they are done.

Weights, and nothing else, are read before the wait. They were written long before, by the loader; between it and the first
step lie copies and plain kernels, which are done before any kernel after them starts. What a kernel with an early start
writes is never a weight.

The next kernel may start once all programs of this one have said so or ended. It is said at once: its programs get what room
this one's leave on the GPU, so none of those can be kept out.
"""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def early(x: Tensor) -> dict[str, bool]:
    """How to launch a kernel that has a parameter PDL and calls `after_earlier`, on x's device: early where it can be."""
    if x.is_cuda and _known(x.device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _known(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def after_earlier(PDL: tl.constexpr):
    """From here on all kernels launched earlier are done. Before: constants alone may be read, and nothing written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
