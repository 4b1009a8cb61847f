"""penalise in the Triton language: a grid of rows and column blocks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.penalise.op import Penalise

_BLOCK = 2048


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
    num_rows, width = logits.shape
    assert logits.stride(1) == prompt_mask.stride(1) == output_counts.stride(1) == 1, "rows are contiguous"
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if num_rows:
        _penalise_blocks[(num_rows, cdiv(width, _BLOCK))](
            logits,
            prompt_mask.view(torch.uint8),
            output_counts,
            repetition,
            presence,
            frequency,
            out,
            width,
            logits.stride(0),
            prompt_mask.stride(0),
            output_counts.stride(0),
            BLOCK=_BLOCK,
        )
    return out


@jit
def _penalise_blocks(
    logits, prompt_mask, output_counts, repetition, presence, frequency, out,
    width, logits_row, mask_row, counts_row, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0).to(tl.float32)
    prompted = tl.load(prompt_mask + row * mask_row + column, mask=inside, other=0) != 0
    count = tl.load(output_counts + row * counts_row + column, mask=inside, other=0)
    penalty = tl.load(repetition + row).to(tl.float32)
    changed = tl.where(logit > 0, tl.div_rn(logit, penalty + tl.zeros_like(logit)), logit * penalty)
    logit = tl.where(prompted | (count > 0), changed, logit)
    logit -= count.to(tl.float32) * tl.load(frequency + row).to(tl.float32)
    logit -= tl.where(count > 0, tl.load(presence + row).to(tl.float32), 0.0)
    tl.store(out + row * width + column, logit.to(out.dtype.element_ty), mask=inside)
