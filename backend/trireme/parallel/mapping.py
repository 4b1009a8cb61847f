"""Mapping: memory of one rank's GPU in the address space of another rank of the host, whose kernels and copies then reach it as their
own. What they do there, and when, is for others to agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

Exchange = Callable[[str, bytes], Sequence[bytes]]
"""(name, what this place says) -> what every place of the group says under that name, by place."""


def map_others(memory: torch.Tensor, place: int, size: int, device: torch.device, exchange: Exchange) -> dict[int, torch.Tensor] | str:
    """By place, the other ranks' tensors of the same shape and dtype. Blocks until all members are here. Or, on all of them, why they
    do not see each other's memory."""
    others = [other for other in range(size) if other != place]
    said = exchange("offered", msgspec.msgpack.encode(offer(memory, others)))
    found, reason = {}, ""
    try:
        for other in others:
            found[other] = mapped(msgspec.msgpack.decode(said[other]), place, device).view(memory.dtype).view(memory.shape)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    reasons = [each.decode() for each in exchange("mapped", reason.encode())]
    return next(filter(None, reasons), found)


def offer(memory: torch.Tensor, others: Sequence[int]) -> dict[str, Any]:
    """What others need to map it, by place; one handle each, since each is counted as one user, until whose end it is not freed.

    It stays with torch for each user that was killed, since nobody counts that one off. To do it here would be unsafe: this rank does
    not know which of the others still live, whose kernels may write into it until they have left the epoch, too.
    """
    try:
        return {"device": memory.get_device(), "handles": {str(other): memory.untyped_storage()._share_cuda_()[1:] for other in others}}
    except RuntimeError as error:
        return {"reason": str(error).splitlines()[0]}


def mapped(offered: dict[str, Any], place: int, device: torch.device) -> torch.Tensor:
    """Another rank's memory, in this GPU's address space: uint8 [bytes]. ValueError or RuntimeError says why that cannot be."""
    if "reason" in offered:
        raise ValueError(f"memory cannot be shared: {offered['reason']}")
    if not torch.cuda.can_device_access_peer(device.index, offered["device"]):
        raise ValueError(f"GPU {device.index} cannot read the memory of GPU {offered['device']}")
    handle, num_bytes, offset, counter, counter_offset, event, _ = offered["handles"][str(place)]
    # on this device, not on the one that has it, where a context would be made; and no event is waited for, since it was synchronised
    storage = torch.UntypedStorage._new_shared_cuda(device.index, handle, num_bytes, offset, counter, counter_offset, event, False)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
