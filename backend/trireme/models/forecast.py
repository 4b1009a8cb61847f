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
    mailbox_bytes,
    mtp_params,
    rank_param_bytes,
    state_bytes,
    vocabulary_rows,
)
from trireme.models.hardware import Device
from trireme.models.spec import Spec
from trireme.models.wire import edge_bytes, stage_wire
from trireme.models.work import Load, Work, head_work, layer_work
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
    mailbox: int  # rows that others put here, where the residual is cut
    kv_per_token: int  # 0 in a stage without attention
    state: int  # of a sequence, whatever its length
    held: int  # of a sequence that has drafts

    @property
    def fixed(self) -> int:
        """However many requests there are."""
        return self.weights + self.activations + self.mailbox

    @property
    def per_request(self) -> int:
        """A slot, and a snapshot for whoever begins with the same text."""
        return 2 * self.state + self.held

    def requests(self, usable_bytes: int, context: int) -> int:
        """Requests of so many tokens that fit beside the rest."""
        pages = ceil(context / PAGE) * PAGE * self.kv_per_token
        return max(0, usable_bytes - self.fixed) // (pages + self.per_request)

    def tokens(self, usable_bytes: int, requests: int) -> int:
        """Tokens whose keys and values fit beside the rest and the states of so many requests, in whole pages."""
        left = usable_bytes - self.fixed - requests * self.per_request
        return max(0, left) // (self.kv_per_token * PAGE) * PAGE


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predictions for one plan. Times are 0 where it does not fit."""

    ranks: tuple[RankBytes, ...]  # of all stages
    usable_bytes: int  # of each device
    demand: Demand
    prefill_s: float = 0.0  # until the first token of a request alone
    decode_s: float = 0.0  # between two tokens of a request among `concurrent`
    redundant_s: float = 0.0  # of decode_s, by redundant experts: their weights are read as well
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
            left = self.usable_bytes - rank.fixed
            return left / (self.demand.context * rank.kv_per_token + rank.per_request), left

        return min(self.ranks, key=room)

    @property
    def missing_bytes(self) -> int:
        """What the fullest rank lacks to hold one request."""
        rank = self.fullest
        request = rank.kv_per_token * self.demand.context + rank.per_request
        return max(0, rank.fixed + request - self.usable_bytes)


def forecast(spec: Spec, plan: Plan, settings: Settings, device: Device, demand: Demand, item_bytes: int) -> Forecast:
    """A prompt is computed in chunks of max_num_batched_tokens that follow one another through the stages. While decoding, the
    requests are dealt into pp steps in flight, and a token costs the longer of two: a step's way through all stages, or the
    slowest stage's work for every step. What drafts bring, and what it costs to make more than one, is not in it; nor that most rows
    of a prompt stop in the last layer."""
    rows = max(settings.max_num_batched_tokens, plan.cp * demand.requests)  # decodes are whole along cp
    work = activation_bytes(spec, plan, rows, demand.requests, item_bytes)
    ranks = tuple(
        RankBytes(
            stage,
            rank,
            weights=rank_param_bytes(spec, plan, stage, rank, item_bytes),
            activations=work,
            mailbox=mailbox_bytes(spec, plan, item_bytes) if device.is_gpu else 0,
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
    clock, plain = (_Clock(spec, each, device, item_bytes) for each in (plan, replace(plan, num_redundant_experts=0)))
    chunk_s = [clock.step(stage, chunk, 1, demand.prompt // 2, regime) for stage in range(plan.pp)]
    prefill_s = sum(chunk_s) + (num_chunks - 1) * max(chunk_s)

    num_steps = min(plan.pp, held.concurrent)
    rows = ceil(held.concurrent / num_steps)
    measured = device.is_gpu and settings.sequence_parallel == "on"  # by ranks, for more rows than any decode has (ranks/regimes.py)
    regime = Regime.of([1] * rows, None if measured else settings.sp_from, plan.cp)
    hops_s = plan.pp * device.reach.hop_s

    def token_s(clock: _Clock) -> float:
        step_s = [clock.step(stage, rows, rows, demand.context, regime) for stage in range(plan.pp)]
        return max(sum(step_s) + hops_s, num_steps * max(step_s))

    decode_s, plain_s = token_s(clock), token_s(plain)
    busy_s = num_chunks * max(chunk_s) + demand.output * decode_s / held.concurrent  # that a request takes of the whole
    times = {"prefill_s": prefill_s + hops_s, "decode_s": decode_s, "redundant_s": decode_s - plain_s}
    return replace(held, **times, tokens_per_s=demand.output / busy_s)


@dataclass(frozen=True)
class _Clock:
    """Seconds of steps: of one part after another, each by whichever takes longer of products and memory, and then of the wire:
    nothing overlaps it."""

    spec: Spec
    plan: Plan
    device: Device
    item_bytes: int

    def step(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> float:
        """Of `rows` rows of `sequences` sequences, each row seeing `keys` keys, in a stage."""
        compute = sum(num * work.seconds(self.device, self.item_bytes) for work, num in self._parts(stage, rows, sequences, keys, regime))
        wire = stage_wire(self.spec, self.plan, stage, rows, regime, self.item_bytes, sequences)
        edge = edge_bytes(self.spec, self.plan, rows, regime, self.item_bytes) if stage < self.plan.pp - 1 else 0
        link = self.device.link * self.device.reach.link
        return compute + (wire.num_bytes + edge) / link + wire.calls * self.device.reach.collective_s

    def _parts(self, stage: int, rows: int, sequences: int, keys: int, regime: Regime) -> list[tuple[Work, int]]:
        """Layers of a stage, and how many there are of each; the head that drafts is one more, and on the last stage there is the
        head, of the rank that has most of it."""
        spec, plan, shares = self.spec, self.plan, Shares.of(self.plan, self.spec)
        seen = rows / plan.moe_dp if regime.cp else rows
        picked = seen * spec.num_experts_per_tok / plan.ep
        load = Load(rows / plan.cp if regime.cp else rows, keys, sequences, sequences, seen, picked, regime.cp)

        def layer(params: LayerParams, linear: bool) -> Work:
            return layer_work(spec, params, linear=linear, shares=shares, load=load, item_bytes=self.item_bytes)

        parts = [(layer(layer_params(spec, kind, shares), kind.linear), num) for kind, num in kinds(spec, plan.layers(stage)).items()]
        if stage == plan.pp - 1:
            parts.append((head_work(spec, vocabulary_rows(spec, plan, rank=0), load, self.item_bytes), 1))
            parts += [(layer(mtp_params(spec, shares), linear=False), 1)] * (plan.mtp > 0)
        return parts
