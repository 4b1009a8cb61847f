"""Wire: the bytes that one rank sends for a step, predicted from the layouts that blocks declare. No torch, no decoder, no rank."""

from __future__ import annotations

from collections import Counter
from math import ceil, prod
from typing import NamedTuple

from trireme.core.step import Regime
from trireme.models.cost import Shares, num_attention_layers, num_linear_layers
from trireme.models.spec import Spec
from trireme.parallel.layout import ROWS, SUM, WHOLE, Cut, Layout, Move, home_of, lay, lay_experts, moves
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan

# What blocks take and give; tests/models/test_wire.py holds the collectives that follow equal to a decoder's.
DENSE = lay(), lay(tp=SUM)
HEAD = lay(cp=WHOLE)  # rows that are sampled may be on any rank
GATHERED = lay_experts(), lay_experts(ep=SUM, moe_tp=SUM)
DISPATCHED = lay_experts(ep=ROWS), lay_experts(ep=ROWS, moe_tp=SUM)


class Wire(NamedTuple):
    """What a rank sends, in collectives and bytes."""

    calls: int = 0
    num_bytes: float = 0.0

    def plus(self, other: Wire, times: int = 1) -> Wire:
        return Wire(self.calls + times * other.calls, self.num_bytes + times * other.num_bytes)


def sent(collective: str, size: int, buffer_bytes: float) -> float:
    """Bytes that each of `size` ranks sends in a collective over a buffer: the ring algorithm's, which none undercuts. The
    buffer is all that is reduced, gathered or dealt out; for all_to_all, what one rank has.

        all_reduce                                 2 (n - 1) / n
        reduce_scatter, all_gather, all_to_all       (n - 1) / n
    """
    return (2 if collective == "all_reduce" else 1) * (size - 1) / size * buffer_bytes


def stage_wire(spec: Spec, plan: Plan, stage: int, rows: int, regime: Regime, item_bytes: int, num_items: int = 1) -> Wire:
    """For a step of `rows` rows of `num_items` items in one stage: its seams, what attention and the delta rule share along cp,
    and what dispatched experts exchange; the head that drafts passes over all rows once. The edge to the next stage is not in it."""
    mesh, total = Mesh(plan), Wire()
    for (have, want), times in Counter(_seams(spec, plan, stage, regime)).items():
        for move in moves(have, want, mesh):
            if move.collective != "slice":
                total = total.plus(_of_move(move, rows, spec.hidden * item_bytes), times)
    if regime.cp:
        total = total.plus(_keys_and_values(spec, plan, rows, item_bytes), num_attention_layers(spec, plan, stage))
        if num_linear := num_linear_layers(spec, plan, stage):
            total = total.plus(_affine(spec, plan, num_items, item_bytes), num_linear)
    if plan.experts == "dispatched" and plan.ep > 1:
        total = total.plus(_exchange(spec, plan, rows, regime, item_bytes), sum(_sparse(spec, plan, stage)))
    return total


def edge_bytes(spec: Spec, plan: Plan, rows: int, regime: Regime, item_bytes: int) -> int:
    """Bytes of the residual that a rank sends to its twin in the next stage."""
    shards = 1 if plan.whole_edges else (plan.tp if regime.sp else 1) * (plan.cp if regime.cp else 1)
    return ceil(rows / shards) * spec.hidden * item_bytes


def _seams(spec: Spec, plan: Plan, stage: int, regime: Regime) -> list[tuple[Layout, Layout]]:
    """(have, want) of every route of a stage."""
    home = home_of(regime)
    edge = lay(cp=WHOLE) if plan.whole_edges else home
    sparse = DISPATCHED if plan.experts == "dispatched" else GATHERED
    blocks = [each for is_sparse in _sparse(spec, plan, stage) for each in (DENSE, sparse if is_sparse else DENSE)]
    embedded, last = (DENSE[1].at(home), home), stage == plan.pp - 1
    routes = [embedded if stage == 0 else (edge, home)]
    for takes, gives in blocks:
        routes += [(home, takes.at(home)), (gives.at(home), home)]
    routes.append((home, HEAD if last else edge))
    return routes + [embedded, (HEAD, home), (home, HEAD)] * (last and plan.mtp > 0)


def _sparse(spec: Spec, plan: Plan, stage: int) -> list[bool]:
    """Of each layer, whether it has experts; the one of the head that drafts is as the last of all."""
    drafts = plan.mtp > 0 and stage == plan.pp - 1
    return [spec.sparse[layer] for layer in plan.layers(stage)] + [spec.sparse[-1]] * drafts


def _of_move(move: Move, rows: int, row_bytes: int) -> Wire:
    cut = move.after if move.collective == "all_gather" else move.before
    return Wire(1, sent(move.collective, move.span.size, _rows(rows, cut) * row_bytes))


def _rows(rows: int, cut: Cut) -> int:
    """Of a rank, under a cut."""
    return ceil(rows / prod(span.size for span in cut))


def _keys_and_values(spec: Spec, plan: Plan, rows: int, item_bytes: int) -> Wire:
    kept = 2 * Shares.of(plan, spec).kv_heads(spec) * spec.head_dim * item_bytes
    return Wire(1, sent("all_gather", plan.cp, rows * kept))


def _affine(spec: Spec, plan: Plan, num_items: int, item_bytes: int) -> Wire:
    """What the convolution sees before each of an item's 2 cp chunks, and what each chunk does to any state (parallel/affine)."""
    delta = Shares.of(plan, spec).delta(spec)
    halo = (delta.kernel - 1) * delta.channels * item_bytes
    done = 4 * delta.num_value_heads * delta.key_dim * (delta.value_dim + delta.key_dim)
    return Wire(2, sent("all_gather", plan.cp, 2 * plan.cp * num_items * (halo + done)))


def _exchange(spec: Spec, plan: Plan, rows: int, regime: Regime, item_bytes: int) -> Wire:
    """How many rows go to each slot (an int64 each), then the rows, one copy for each expert that a row chose, and back."""
    mine = ceil(rows / (plan.moe_dp if regime.cp else 1) / plan.ep)
    buffer = 8 * spec.num_experts + 2 * mine * spec.num_experts_per_tok * spec.hidden * item_bytes
    return Wire(3, sent("all_to_all", plan.ep, buffer))
