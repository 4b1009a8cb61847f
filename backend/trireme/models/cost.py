"""Cost: what each rank of a plan holds, keeps and works with, in numbers and bytes, and where stages part. Measures nothing.

Layers describe the same weights tensor by tensor, in torch; here they are sums that need none. tests/models/test_cost.py holds
the two equal, byte for byte.
"""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from trireme.core.refusal import Refusal
from trireme.models.spec import Spec

if TYPE_CHECKING:
    from trireme.parallel.plan import Plan


class Shares(NamedTuple):
    """How many ranks share each kind of weight."""

    heads: int = 1  # attention's heads, the dense MLP's columns, the vocabulary
    slots: int = 1  # the experts
    expert: int = 1  # the columns of one expert
    shared: int = 1  # the columns of the shared expert

    @classmethod
    def of(cls, plan: Plan, spec: Spec) -> Shares:
        shared = plan.moe_tp if plan.experts == "dispatched" else plan.ep * plan.moe_tp  # the ranks that owe the sum
        return cls(plan.tp, plan.ep, plan.moe_tp, shared if spec.shared_intermediate % shared == 0 else 1)

    def kv_heads(self, spec: Spec) -> int:
        """Of a rank; where ranks outnumber them, a copy of one."""
        return max(1, spec.num_kv_heads // self.heads)


ALONE = Shares()


class LayerParams(NamedTuple):
    """Numbers in a rank's share of one layer."""

    attention: int  # with its norms
    mlp: int  # what every row reads: the dense MLP, or router, shared expert and its gate; with the norm
    slots: int = 0  # experts held
    expert: int = 0  # numbers of each

    @property
    def held(self) -> int:
        return self.attention + self.mlp + self.slots * self.expert


def layer_params(spec: Spec, sparse: bool, shares: Shares = ALONE) -> LayerParams:
    """Numbers that a rank holds of a layer, dense or with experts. Biases of sums are whole on every rank, as are norms and
    routers."""
    hidden = spec.hidden
    q, kv = spec.num_heads // shares.heads * spec.head_dim, shares.kv_heads(spec) * spec.head_dim
    attention = (hidden + spec.qkv_bias) * (q + 2 * kv) + (q + spec.o_bias) * hidden + 2 * spec.head_dim * spec.qk_norm + hidden
    if not sparse:
        columns = spec.intermediate // shares.heads
        return LayerParams(attention, 3 * hidden * columns + spec.mlp_bias * (2 * columns + hidden) + hidden)
    shared = 3 * hidden * (spec.shared_intermediate // shares.shared) + hidden if spec.shared_intermediate else 0
    return LayerParams(
        attention,
        mlp=hidden * spec.num_experts + shared + hidden,
        slots=spec.num_experts // shares.slots,
        expert=3 * hidden * (spec.moe_intermediate // shares.expert),
    )


def vocabulary_rows(spec: Spec, plan: Plan, rank: int) -> int:
    """Tokens whose vectors a rank has: equal runs over tp, the last ones shorter."""
    run = ceil(spec.vocab_size / plan.tp)
    return max(0, min(run, spec.vocab_size - rank % plan.tp * run))


def rank_param_bytes(spec: Spec, plan: Plan, stage: int, rank: int, item_bytes: int) -> int:
    """Bytes of parameters that rank `rank` of a stage allocates: its share of the stage's layers, of the embedding if first,
    of norm and head if last (the head shares a tied embedding only where one stage has both)."""
    first, last, shares = stage == 0, stage == plan.pp - 1, Shares.of(plan, spec)
    layers = sum(layer_params(spec, spec.sparse[layer], shares).held for layer in plan.layers(stage))
    num_vocabularies = first + last - (first and last and spec.tie_word_embeddings)
    vocabulary = num_vocabularies * vocabulary_rows(spec, plan, rank) * spec.hidden
    return item_bytes * (layers + vocabulary + last * spec.hidden)


def kv_bytes_per_token(spec: Spec, plan: Plan, stage: int, item_bytes: int) -> int:
    """Bytes that a token keeps on each rank of a stage: keys and values of the rank's heads, all tokens along cp."""
    return plan.layer_cut[stage] * 2 * Shares.of(plan, spec).kv_heads(spec) * spec.head_dim * item_bytes


def activation_bytes(spec: Spec, plan: Plan, rows: int, samples: int, item_bytes: int) -> int:
    """An estimate of what a step of `rows` rows, `samples` of them sampled, needs on a rank beside weights and pages: the table
    of rotary positions, the residual, and the widest of

        attention        in [n, H], q k v [n, Q + 2K], keys and values along cp [rows, 2K], out [n, Q] and [n, H]
        dense MLP        in [n, H], gate and up [n, 2I], their product [n, I], out [n, H]
        experts          in and out [n', H] of all rows that they see; of the m rows that the router could send to one rank
                         in and out [m, H], gate and up [m, 2I], their product [m, I]
        head             logits [samples, V], once as they are and once in float32

    with n = rows / cp, n' = rows / moe_dp, m = n' * min(experts of a token, slots of a rank), and each width a rank's share.
    A router that sends every row to one rank is rare, but memory must hold it.
    """
    shares = Shares.of(plan, spec)
    near = ceil(rows / plan.cp)
    q, kv = spec.num_heads // shares.heads * spec.head_dim, shares.kv_heads(spec) * spec.head_dim
    widest = [near * (2 * spec.hidden + 2 * q + 2 * kv) + (plan.cp > 1) * rows * 2 * kv]
    if not all(spec.sparse):
        widest.append(near * (2 * spec.hidden + 3 * spec.intermediate // shares.heads))
    if any(spec.sparse):
        seen = ceil(rows / plan.moe_dp)
        sent = seen * min(spec.num_experts_per_tok, spec.num_experts // shares.slots)
        widest.append(2 * seen * spec.hidden + sent * (2 * spec.hidden + 3 * spec.moe_intermediate // shares.expert))
    residual = ceil(near / plan.tp) if plan.sp else near
    logits = samples * vocabulary_rows(spec, plan, rank=0) * (item_bytes + 4)
    rotary = 4 * spec.max_position_embeddings * spec.head_dim
    return rotary + max(item_bytes * (residual * spec.hidden + max(widest)), logits)


def touched(spec: Spec, rows: int) -> float:
    """The share of a layer's experts that `rows` rows read, expected of a router that treats all alike:
    1 - (1 - k / E) ** rows.

    8 of 128 experts: 1 row reads 1/16 of them, 16 rows 0.64, 64 rows 0.98.
    """
    return 1 - (1 - spec.num_experts_per_tok / spec.num_experts) ** rows if spec.num_experts else 0.0


def read_params(params: LayerParams, share: float) -> float:
    """Numbers of a layer that a step reads which touches this share of its experts."""
    return params.attention + params.mlp + share * params.slots * params.expert


def cut_layers(spec: Spec, num_stages: int, rows: int = 32) -> list[int]:
    """Layers of each stage such that the slowest decode step of `rows` rows is fastest. A step reads each weight of dense
    layers once, of experts those that its rows go to, the head once, and of the embedding only its rows' vectors: so the head
    weighs on the last stage and the embedding on none.

    SmolLM2-135M (30 layers; the head weighs as much as 8): [19, 11].
    """
    if num_stages > spec.num_layers:
        raise Refusal(
            f"{num_stages} stages for {spec.num_layers} layers",
            why="every stage needs a layer",
            fix=f"set pipeline_parallel_size to at most {spec.num_layers}",
        )
    share = touched(spec, rows)
    costs = [round(read_params(layer_params(spec, sparse), share)) for sparse in spec.sparse]
    return balance(costs, spec.vocab_size * spec.hidden, num_stages)


def balance(costs: list[int], tail: int, num_stages: int) -> list[int]:
    """Cut `costs` into runs, each not empty, with `tail` on the last, so that the dearest is cheapest and, among those, the
    squares sum to least. Exact, by dynamic programming; O(num_stages * len(costs)^2).

    balance([1, 1, 1, 1], 2, 2) == [3, 1]
    """
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    @cache
    def best(start: int, stages: int) -> tuple[int, int, tuple[int, ...]]:  # (dearest, sum of squares, layers of each)
        if stages == 1:
            load = prefix[-1] - prefix[start] + tail
            return load, load * load, (len(costs) - start,)
        choices = []
        for end in range(start + 1, len(costs) - stages + 2):
            load = prefix[end] - prefix[start]
            dearest, squares, cut = best(end, stages - 1)
            choices.append((max(load, dearest), load * load + squares, (end - start, *cut)))
        return min(choices)

    return list(best(0, num_stages)[2])
