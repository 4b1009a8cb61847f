"""Load: drives a running front with a workload over gRPC streaming and measures every token's arrival. Draws nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trireme.core.refusal import Refusal
from trireme_tools.client import Client
from trireme_tools.workload import Ask


@dataclass
class Record:
    """One request as the client saw it; seconds since the load began."""

    num_input: int
    sent: float
    arrivals: list[float] = field(default_factory=list)  # of each output token
    error: str = ""

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps_s(self) -> np.ndarray:
        """Inter-token latencies. Tokens of one response share the time since the one before."""
        return np.diff(self.arrivals)


def drive(
    url: str, workload: Sequence[Ask], send_at: np.ndarray, concurrency: int | None, progress: Callable[[int], None]
) -> tuple[list[Record], float]:
    """(records, seconds in all). At most `concurrency` requests at once; each is sent no earlier than `send_at` says."""
    return asyncio.run(_drive(url, workload, send_at, concurrency or len(workload), progress))


async def _drive(
    url: str, workload: Sequence[Ask], send_at: np.ndarray, concurrency: int, progress: Callable[[int], None]
) -> tuple[list[Record], float]:
    gate, records = asyncio.Semaphore(concurrency), []
    async with Client(url) as client:
        requests = [_request(client, ask) for ask in workload]  # made ahead: it takes as long as a step
        began = time.perf_counter()

        async def one(ask: Ask, request: dict[str, Any], at: float) -> None:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
            async with gate:
                records.append(record := Record(len(ask.prompt), time.perf_counter() - began))
                await _one(client, ask, request, record, began)
            progress(1)

        tasks = []
        for ask, request, at in zip(workload, requests, send_at, strict=True):
            tasks.append(asyncio.create_task(one(ask, request, float(at))))
            await asyncio.sleep(0)  # else none leaves before all have begun
        await asyncio.gather(*tasks)
        return records, time.perf_counter() - began


def _request(client: Client, ask: Ask) -> dict[str, Any]:
    sampling = {"max_tokens": ask.num_output, "temperature": ask.temperature, "ignore_eos": True}
    return client.request("output_ids", input_ids=ask.prompt, stream=True, **sampling)


async def _one(client: Client, ask: Ask, request: dict[str, Any], record: Record, began: float) -> None:
    last = record.sent
    try:
        async for response in client.send(request):
            now, tokens = time.perf_counter() - began, len(response.get("output_ids", []))
            record.arrivals += [last + (now - last) * (i + 1) / tokens for i in range(tokens)] if record.arrivals else [now] * tokens
            last = now
    except Refusal as refusal:
        record.error = refusal.why
    if not record.error and len(record.arrivals) != ask.num_output:
        record.error = f"{len(record.arrivals)} tokens came, {ask.num_output} were asked"


def summary(records: Sequence[Record], seconds: float) -> dict[str, float | int | dict[str, float]]:
    """Throughputs in tokens a second, latencies in milliseconds by percentile. Failed requests count as failed and nowhere else."""
    good = [record for record in records if not record.error]
    num_output = sum(len(record.arrivals) for record in good)
    latencies = {
        "ttft_ms": [record.first_token_s for record in good],
        "itl_ms": np.concatenate([record.gaps_s for record in good]) if good else [],
        "e2e_ms": [record.arrivals[-1] - record.sent for record in good],
    }
    return {
        "requests": len(good),
        "failed": len(records) - len(good),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "input_tokens": sum(record.num_input for record in good),
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / seconds,
        "total_tokens_per_s": (num_output + sum(record.num_input for record in good)) / seconds,
        **{name: percentiles(values) for name, values in latencies.items()},
    }


def percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Milliseconds: mean, p50, p90, p99."""
    if not len(seconds):
        return {}
    values = np.asarray(seconds) * 1e3
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}
