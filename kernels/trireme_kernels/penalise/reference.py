"""penalise in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.penalise.op import Penalise


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> Penalise:
    return penalise


def penalise(
    logits: Tensor,  # [n, V]
    prompt_mask: Tensor,  # [n, V]
    output_counts: Tensor,  # [n, V]
    repetition: Tensor,  # [n]
    presence: Tensor,  # [n]
    frequency: Tensor,  # [n]
) -> Tensor:  # [n, V]
    sampled = output_counts > 0
    repetition = torch.where(prompt_mask | sampled, repetition[:, None].to(logits.dtype), 1.0)
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    return logits.sub_(output_counts * frequency[:, None]).sub_(sampled * presence[:, None])
