"""Forecast: what a plan would hold and how long its steps would take, predicted from a data sheet. Nothing here is measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from trireme.core.settings import Settings
from trireme.core.step import PAGE, Regime
from trireme.models.cost import (
    Shares,
    activation_bytes,
    kv_bytes_per_token,
    layer_params,
    rank_param_bytes,
    read_params,
    touched,
    vocabulary_rows,
)
from trireme.models.hardware import Device
from trireme.models.spec import Spec
from trireme.models.wire import edge_bytes, stage_wire
from trireme.parallel.plan import Plan


class Demand(NamedTuple):
    """What is to be served: so many requests at once, each of `context` tokens, of which it asks for the last `output`."""

    context: int
    requests: int
    output: int

    @property
    def prompt(self) -> int:
        return self.context - self.output


class RankBytes(NamedTuple):
    """Of one rank."""

    stage: int
    rank: int
    weights: int
    activations: int
    kv_per_token: int

    def tokens(self, usable_bytes: int) -> int:
        """Tokens whose keys and values fit beside the rest, in whole pages."""
        return max(0, usable_bytes - self.weights - self.activations) // (self.kv_per_token * PAGE) * PAGE


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predictions for one plan. Times are 0 where it does not fit."""

    ranks: tuple[RankBytes, ...]  # of all stages
    usable_bytes: int  # of each device
    demand: Demand
    prefill_s: float = 0.0  # until the first token of a request alone
    decode_s: float = 0.0  # between two tokens of a request among `concurrent`
    tokens_per_s: float = 0.0  # answered to all, their prefills included

    @property
    def capacity_tokens(self) -> int:
        return min(rank.tokens(self.usable_bytes) for rank in self.ranks)

    @property
    def capacity_requests(self) -> int:
        return self.capacity_tokens // self.demand.context

    @property
    def concurrent(self) -> int:
        """Requests that run at once."""
        return min(self.demand.requests, self.capacity_requests)

    @property
    def fits(self) -> bool:
        """One request, at least."""
        return self.capacity_requests > 0

    @property
    def fullest(self) -> RankBytes:
        """The rank that limits how many tokens there are; the first of several."""
        return min(self.ranks, key=lambda rank: (rank.tokens(self.usable_bytes), -rank.weights - rank.activations))

    @property
    def missing_bytes(self) -> int:
        """What the fullest rank lacks to hold one request."""
        rank = self.fullest
        return max(0, rank.weights + rank.activations + rank.kv_per_token * self.demand.context - self.usable_bytes)


def forecast(spec: Spec, plan: Plan, settings: Settings, device: Device, demand: Demand, item_bytes: int) -> Forecast:
    """A prompt is computed in chunks of max_num_batched_tokens that follow one another through the stages. While decoding, the
    requests are dealt into pp steps in flight, and a token costs the longer of two: a step's way through all stages, or the
    slowest stage's work for every step."""
    rows = max(settings.max_num_batched_tokens, plan.cp * demand.requests)  # decodes are whole along cp
    work = activation_bytes(spec, plan, rows, demand.requests, item_bytes)
    ranks = tuple(
        RankBytes(
            stage, rank, rank_param_bytes(spec, plan, stage, rank, item_bytes), work, kv_bytes_per_token(spec, plan, stage, item_bytes)
        )
        for stage in range(plan.pp)
        for rank in range(plan.ranks)
    )
    held = Forecast(ranks=ranks, usable_bytes=device.usable_bytes, demand=demand)
    if not held.fits:
        return held

    num_chunks = ceil(demand.prompt / settings.max_num_batched_tokens)
    chunk = ceil(demand.prompt / num_chunks)
    regime = Regime.of([chunk], settings.sp_from, plan.cp)
    clock = _Clock(spec, plan, device, item_bytes)
    chunk_s = [clock.step(stage, chunk, 1, demand.prompt // 2, regime) for stage in range(plan.pp)]
    prefill_s = sum(chunk_s) + (num_chunks - 1) * max(chunk_s)

    num_steps = min(plan.pp, held.concurrent)
    rows = ceil(held.concurrent / num_steps)
    regime = Regime.of([1] * rows, settings.sp_from, plan.cp)
    step_s = [clock.step(stage, rows, rows, demand.context, regime) for stage in range(plan.pp)]
    hops_s = plan.pp * device.reach.hop_s
    decode_s = max(sum(step_s) + hops_s, num_steps * max(step_s))

    busy_s = num_chunks * max(chunk_s) + demand.output * decode_s / held.concurrent  # that a request takes of the whole
    return replace(held, prefill_s=prefill_s + hops_s, decode_s=decode_s, tokens_per_s=demand.output / busy_s)


@dataclass(frozen=True)
class _Clock:
    """Seconds of steps, by whichever takes longest of products and memory, and then the wire: nothing overlaps it."""

    spec: Spec
    plan: Plan
    device: Device
    item_bytes: int

    def step(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Of `rows` rows of `sequences` sequences, each row seeing `keys` keys (sliding windows are not counted), in a stage."""
        compute = max(
            self._flops(stage, rows, sequences, keys, regime) / self.device.flops(self.item_bytes),
            self._bytes(stage, rows, sequences, keys, regime) / (self.device.bandwidth * self.device.reach.bandwidth),
        )
        wire = stage_wire(self.spec, self.plan, stage, rows, regime, self.item_bytes)
        edge = edge_bytes(self.spec, self.plan, rows, regime, self.item_bytes) if stage < self.plan.pp - 1 else 0
        link = self.device.link * self.device.reach.link
        return compute + (wire.num_bytes + edge) / link + wire.calls * self.device.reach.collective_s

    def _flops(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Two for each number and row, and four for each key and number of a query: scores, and values by them."""
        spec, shares = self.spec, Shares.of(self.plan, self.spec)
        near = rows / self.plan.cp if regime.cp else rows
        picks = self._seen(rows, regime) * spec.num_experts_per_tok / self.plan.ep
        total = 4 * near * keys * self.plan.layer_cut[stage] * (spec.num_heads // shares.heads) * spec.head_dim
        for sparse, num_layers in self._kinds(stage):
            params = layer_params(spec, sparse, shares)
            total += 2 * num_layers * (near * (params.attention + params.mlp) + picks * params.expert)
        return total + 2 * sequences * self._head(stage)

    def _bytes(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Weights once, and each sequence's keys and values."""
        spec, shares = self.spec, Shares.of(self.plan, self.spec)
        share = touched(spec, round(self._seen(rows, regime)))
        numbers = sum(num * read_params(layer_params(spec, sparse, shares), share) for sparse, num in self._kinds(stage))
        cached = sequences * keys * kv_bytes_per_token(spec, self.plan, stage, self.item_bytes)
        return self.item_bytes * (numbers + self._head(stage)) + cached

    def _seen(self, rows: int, regime: Regime) -> float:
        """Rows that one copy of the experts serves."""
        return rows / self.plan.moe_dp if regime.cp else rows

    def _kinds(self, stage: int) -> list[tuple[bool, int]]:
        return list(Counter(self.spec.sparse[layer] for layer in self.plan.layers(stage)).items())

    def _head(self, stage: int) -> int:
        """Numbers of the head, on the rank that has most of it."""
        return vocabulary_rows(self.spec, self.plan, rank=0) * self.spec.hidden if stage == self.plan.pp - 1 else 0
