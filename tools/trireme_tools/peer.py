"""The peer of `trireme bench`: transformers' generate on the same prompts, in batches of equal size, greedy, float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trireme_tools.workload import Ask


@torch.inference_mode()
def generate_batches(model_dir: str, workload: Sequence[Ask], batch_size: int, progress: Callable[[int], None]) -> dict[str, float | int]:
    """Speed over the whole workload. A batch runs until its longest answer is done (transformers cannot do otherwise);
    only tokens that were asked for count. Shorter prompts are padded in front. One warm-up forward is not counted."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    pad = model.generation_config.pad_token_id or 0
    model(torch.zeros(1, 8, dtype=torch.long))
    began = time.perf_counter()
    for first in range(0, len(workload), batch_size):
        batch = workload[first : first + batch_size]
        width, length = max(len(ask.prompt) for ask in batch), max(ask.num_output for ask in batch)
        tokens = torch.tensor([[pad] * (width - len(ask.prompt)) + list(ask.prompt) for ask in batch])
        mask = torch.tensor([[0] * (width - len(ask.prompt)) + [1] * len(ask.prompt) for ask in batch])
        model.generate(tokens, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=pad)
        progress(len(batch))
    seconds, num_output = time.perf_counter() - began, sum(ask.num_output for ask in workload)
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / seconds,
    }
