"""A process for each of some GPUs, tied to this one: what tests of several GPUs run in."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable
from typing import Any

import torch

from trireme.parallel.comm import StoreHost, reach_store

LIMIT_S = 30.0


def _rank(work: Callable[..., Any], place: int, store: str, epoch: int, answers: Any, args: tuple) -> None:
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # as ranks have
    torch.cuda.set_device(place)
    answers.put((place, work(place, reach_store(store, LIMIT_S), epoch, torch.device("cuda", place), *args)))


def on_gpus(num: int, work: Callable[..., Any], epoch: int, *args: Any, wait_for: tuple[int, ...] | None = None) -> dict[int, Any]:
    """work(place, store, epoch, device, *args) in a process for each GPU; what the places of `wait_for`, or all, return."""
    context, host = multiprocessing.get_context("spawn"), StoreHost(LIMIT_S)
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(work, place, host.address, epoch, answers, args)) for place in range(num)]
    for rank in ranks:
        rank.start()
    found = {}
    try:
        while set(wait_for or range(num)) - set(found):
            place, answer = answers.get(timeout=120)
            found[place] = answer
    except queue.Empty:
        raise AssertionError(f"only {sorted(found)} answered") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return found
