"""Forecast: what a plan would hold and how long its steps would take, predicted from a data sheet. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from trireme.core.settings import Settings
from trireme.core.step import PAGE, Regime
from trireme.models.cost import (
    LayerParams,
    Shares,
    activation_bytes,
    held_bytes,
    kinds,
    kv_bytes_per_token,
    layer_params,
    mtp_params,
    num_attention_layers,
    num_linear_layers,
    rank_param_bytes,
    read_params,
    state_bytes,
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
    kv_per_token: int  # 0 in a stage without attention
    state: int  # of a sequence, whatever its length
    held: int  # of a sequence that has drafts

    @property
    def per_request(self) -> int:
        """A slot, and a snapshot for whoever begins with the same text."""
        return 2 * self.state + self.held

    def requests(self, usable_bytes: int, context: int) -> int:
        """Requests of so many tokens that fit beside the rest."""
        pages = ceil(context / PAGE) * PAGE * self.kv_per_token
        return max(0, usable_bytes - self.weights - self.activations) // (pages + self.per_request)

    def tokens(self, usable_bytes: int, requests: int) -> int:
        """Tokens whose keys and values fit beside the rest and the states of so many requests, in whole pages."""
        left = usable_bytes - self.weights - self.activations - requests * self.per_request
        return max(0, left) // (self.kv_per_token * PAGE) * PAGE


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
        """Of the requests that run at once, and of texts that others may begin with."""
        return min(rank.tokens(self.usable_bytes, self.concurrent) for rank in self.ranks if rank.kv_per_token)

    @property
    def capacity_requests(self) -> int:
        return min(rank.requests(self.usable_bytes, self.demand.context) for rank in self.ranks)

    @property
    def state_bytes(self) -> int:
        """Of a sequence, on the rank that has most of it."""
        return max(rank.state for rank in self.ranks)

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
        """The rank that limits how many requests there are; the first of several."""

        def room(rank: RankBytes) -> tuple[float, int]:
            left = self.usable_bytes - rank.weights - rank.activations
            return left / (self.demand.context * rank.kv_per_token + rank.per_request), left

        return min(self.ranks, key=room)

    @property
    def missing_bytes(self) -> int:
        """What the fullest rank lacks to hold one request."""
        rank = self.fullest
        request = rank.kv_per_token * self.demand.context + rank.per_request
        return max(0, rank.weights + rank.activations + request - self.usable_bytes)


def forecast(spec: Spec, plan: Plan, settings: Settings, device: Device, demand: Demand, item_bytes: int) -> Forecast:
    """A prompt is computed in chunks of max_num_batched_tokens that follow one another through the stages. While decoding, the
    requests are dealt into pp steps in flight, and a token costs the longer of two: a step's way through all stages, or the
    slowest stage's work for every step. What drafts bring, and what it costs to make more than one, is not in it."""
    rows = max(settings.max_num_batched_tokens, plan.cp * demand.requests)  # decodes are whole along cp
    work = activation_bytes(spec, plan, rows, demand.requests, item_bytes)
    ranks = tuple(
        RankBytes(
            stage,
            rank,
            weights=rank_param_bytes(spec, plan, stage, rank, item_bytes),
            activations=work,
            kv_per_token=kv_bytes_per_token(spec, plan, stage, item_bytes),
            state=state_bytes(spec, plan, stage, item_bytes),
            held=held_bytes(spec, plan, stage, item_bytes),
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
        wire = stage_wire(self.spec, self.plan, stage, rows, regime, self.item_bytes, sequences)
        edge = edge_bytes(self.spec, self.plan, rows, regime, self.item_bytes) if stage < self.plan.pp - 1 else 0
        link = self.device.link * self.device.reach.link
        return compute + (wire.num_bytes + edge) / link + wire.calls * self.device.reach.collective_s

    def _flops(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Two for each number and row, and four for each key and number of a query: scores, and values by them. A row of the
        delta rule meets each number of a state three times; along cp the state is wider by what it would do to any other."""
        spec, shares = self.spec, Shares.of(self.plan, self.spec)
        near = rows / self.plan.cp if regime.cp else rows
        picks = self._seen(rows, regime) * spec.num_experts_per_tok / self.plan.ep
        attended = num_attention_layers(spec, self.plan, stage) * (spec.num_heads // shares.heads) * spec.head_dim
        total = 4 * near * keys * attended + near * num_linear_layers(spec, self.plan, stage) * self._delta_flops(regime)
        for params, num in self._parts(stage):
            total += 2 * num * (near * (params.mixer + params.mlp) + picks * params.expert)
        return total + 2 * sequences * self._head(stage)

    def _bytes(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Weights once, each sequence's keys and values, and its states there and back."""
        spec = self.spec
        share = touched(spec, round(self._seen(rows, regime)))
        numbers = sum(num * read_params(params, share) for params, num in self._parts(stage))
        cached = keys * kv_bytes_per_token(spec, self.plan, stage, self.item_bytes)
        carried = 2 * state_bytes(spec, self.plan, stage, self.item_bytes)
        return self.item_bytes * (numbers + self._head(stage)) + sequences * (cached + carried)

    def _delta_flops(self, regime: Regime) -> int:
        """Of one row in one layer."""
        if self.spec.delta is None:
            return 0
        delta = Shares.of(self.plan, self.spec).delta(self.spec)
        width = delta.value_dim + regime.cp * delta.key_dim
        return 6 * delta.num_value_heads * delta.key_dim * width

    def _seen(self, rows: int, regime: Regime) -> float:
        """Rows that one copy of the experts serves."""
        return rows / self.plan.moe_dp if regime.cp else rows

    def _parts(self, stage: int) -> list[tuple[LayerParams, int]]:
        """Layers of a stage, and how many there are of each; the head that drafts is one more."""
        spec, shares = self.spec, Shares.of(self.plan, self.spec)
        found = [(layer_params(spec, kind, shares), num) for kind, num in kinds(spec, self.plan.layers(stage)).items()]
        drafts = self.plan.mtp > 0 and stage == self.plan.pp - 1
        return found + [(mtp_params(spec, shares), 1)] * drafts

    def _head(self, stage: int) -> int:
        """Numbers of the head, on the rank that has most of it."""
        return vocabulary_rows(self.spec, self.plan, rank=0) * self.spec.hidden if stage == self.plan.pp - 1 else 0
