"""Cost: what each rank of a plan holds, keeps and works with, in numbers and bytes. Measures nothing.

Layers describe the same weights tensor by tensor, in torch; here they are sums that need none. tests/models/test_cost.py holds
the two equal, byte for byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from trireme.models.spec import Delta, Spec

if TYPE_CHECKING:
    from trireme.parallel.plan import Plan


class Shares(NamedTuple):
    """How many ranks share each kind of weight."""

    heads: int = 1  # heads of attention and of delta layers, the dense MLP's columns, the vocabulary
    slots: int = 1  # the experts
    expert: int = 1  # the columns of one expert
    shared: int = 1  # the columns of the shared expert
    num_redundant: int = 0  # slots beyond the experts, before they are shared

    @classmethod
    def of(cls, plan: Plan, spec: Spec) -> Shares:
        shared = plan.moe_tp if plan.experts == "dispatched" else plan.ep * plan.moe_tp  # the ranks that owe the sum
        return cls(plan.tp, plan.ep, plan.moe_tp, shared if spec.shared_intermediate % shared == 0 else 1, plan.num_redundant_experts)

    def kv_heads(self, spec: Spec) -> int:
        """Of a rank; where ranks outnumber them, a copy of one."""
        return max(1, spec.num_kv_heads // self.heads)

    def slots_of(self, spec: Spec) -> int:
        """Slots of a rank, in each layer with experts."""
        return (spec.num_experts + self.num_redundant) // self.slots

    def delta(self, spec: Spec) -> Delta:
        """Sizes of a rank's share of a delta layer."""
        whole = spec.delta
        assert whole is not None, f"{spec.family} has no delta layers"
        heads = whole.num_key_heads // self.heads, whole.num_value_heads // self.heads
        return replace(whole, num_key_heads=heads[0], num_value_heads=heads[1])


ALONE = Shares()


class Kind(NamedTuple):
    """What a layer is made of."""

    sparse: bool = False  # experts in place of a dense MLP
    linear: bool = False  # a gated delta rule in place of attention

    @classmethod
    def of(cls, spec: Spec, layer: int) -> Kind:
        return cls(spec.sparse[layer], bool(spec.linear) and spec.linear[layer])


def kinds(spec: Spec, layers: Iterable[int]) -> Counter[Kind]:
    """How many layers there are of each kind."""
    return Counter(Kind.of(spec, layer) for layer in layers)


class LayerParams(NamedTuple):
    """Numbers in a rank's share of one layer."""

    mixer: int  # attention or the delta rule, with its norms
    mlp: int  # what every row reads: the dense MLP, or router, shared expert and its gate; with the norm
    slots: int = 0  # experts held
    expert: int = 0  # numbers of each
    single: int = 0  # of mixer and mlp: numbers that are float32 whatever the others are

    @property
    def held(self) -> int:
        return self.mixer + self.mlp + self.slots * self.expert

    def num_bytes(self, item_bytes: int) -> int:
        return _bytes(self.held, self.single, item_bytes)


def layer_params(spec: Spec, kind: Kind, shares: Shares = ALONE) -> LayerParams:
    """Numbers that a rank holds of a layer. Biases of sums are whole on every rank, as are norms and routers; norms that multiply
    by 1 + weight are kept as such in float32."""
    hidden, columns = spec.hidden, spec.intermediate // shares.heads
    mixer, single = _delta_params(spec, shares) if kind.linear else _attention_params(spec, shares)
    single += hidden * spec.zero_centred
    if not kind.sparse:
        return LayerParams(mixer, 3 * hidden * columns + spec.mlp_bias * (2 * columns + hidden) + hidden, single=single)
    shared = 3 * hidden * (spec.shared_intermediate // shares.shared) + hidden if spec.shared_intermediate else 0
    return LayerParams(
        mixer,
        mlp=hidden * spec.num_experts + shared + hidden,
        slots=shares.slots_of(spec),
        expert=3 * hidden * (spec.moe_intermediate // shares.expert),
        single=single,
    )


def _attention_params(spec: Spec, shares: Shares) -> tuple[int, int]:
    """(numbers, how many of them are float32). A gate is as large as the queries."""
    hidden = spec.hidden
    q, kv = spec.num_heads // shares.heads * spec.head_dim, shares.kv_heads(spec) * spec.head_dim
    norms = 2 * spec.head_dim * spec.qk_norm + hidden
    products = (hidden + spec.qkv_bias) * (q * (1 + spec.gated_attention) + 2 * kv) + (q + spec.o_bias) * hidden
    return products + norms, norms * spec.zero_centred


def _delta_params(spec: Spec, shares: Shares) -> tuple[int, int]:
    """The same of a gated delta rule: qkv, z, a, b and out, the convolution, the norm of each head, and A_log and dt_bias."""
    hidden, delta = spec.hidden, shares.delta(spec)
    values = delta.num_value_heads * delta.value_dim
    products = hidden * (delta.channels + values + 2 * delta.num_value_heads) + values * hidden
    norms, gates = delta.value_dim + hidden, 2 * delta.num_value_heads
    return products + delta.channels * delta.kernel + norms + gates, gates + hidden * spec.zero_centred


def mtp_params(spec: Spec, shares: Shares = ALONE) -> LayerParams:
    """The head that drafts: a layer as the last one's but with full attention, two norms, the product of both rows, and a norm.
    What it takes of the vocabulary is counted with the rest of it."""
    hidden = spec.hidden
    layer = layer_params(spec, Kind(sparse=spec.sparse[-1]), shares)
    norms = 3 * hidden
    return layer._replace(mlp=layer.mlp + 2 * hidden * hidden + norms, single=layer.single + norms * spec.zero_centred)


def _bytes(numbers: int, single: int, item_bytes: int) -> int:
    return item_bytes * (numbers - single) + 4 * single


def vocabulary_rows(spec: Spec, plan: Plan, rank: int) -> int:
    """Tokens whose vectors a rank has: equal runs over tp, the last ones shorter."""
    run = ceil(spec.vocab_size / plan.tp)
    return max(0, min(run, spec.vocab_size - rank % plan.tp * run))


def rank_param_bytes(spec: Spec, plan: Plan, stage: int, rank: int, item_bytes: int) -> int:
    """Bytes of parameters that rank `rank` of a stage allocates: its share of the stage's layers, of the embedding if first or
    for the head that drafts, of norm, head and that head if last (where embeddings are tied, one stage has them once)."""
    first, last, shares = stage == 0, stage == plan.pp - 1, Shares.of(plan, spec)
    layers = sum(layer_params(spec, Kind.of(spec, layer), shares).num_bytes(item_bytes) for layer in plan.layers(stage))
    embeds = first or (last and plan.mtp > 0)
    num_vocabularies = embeds + last - (embeds and last and spec.tie_word_embeddings)
    vocabulary = item_bytes * num_vocabularies * vocabulary_rows(spec, plan, rank) * spec.hidden
    norm = last * _bytes(spec.hidden, spec.hidden * spec.zero_centred, item_bytes)
    return layers + vocabulary + norm + (last and plan.mtp > 0) * mtp_params(spec, shares).num_bytes(item_bytes)


def num_linear_layers(spec: Spec, plan: Plan, stage: int) -> int:
    """Layers of a stage that keep states."""
    return sum(Kind.of(spec, layer).linear for layer in plan.layers(stage))


def num_attention_layers(spec: Spec, plan: Plan, stage: int) -> int:
    """Layers of a stage that keep keys and values; the one of the head that drafts is one of them."""
    return plan.layer_cut[stage] - num_linear_layers(spec, plan, stage) + (plan.mtp > 0 and stage == plan.pp - 1)


def kv_bytes_per_token(spec: Spec, plan: Plan, stage: int, item_bytes: int) -> int:
    """Bytes that a token keeps on each rank of a stage: keys and values of the rank's heads, all tokens along cp."""
    return num_attention_layers(spec, plan, stage) * 2 * Shares.of(plan, spec).kv_heads(spec) * spec.head_dim * item_bytes


def state_bytes(spec: Spec, plan: Plan, stage: int, item_bytes: int) -> int:
    """Bytes of a sequence's states on each rank of a stage, as long as the sequence may be: of a slot, and of a snapshot. All
    ranks along cp have them."""
    num_linear = num_linear_layers(spec, plan, stage)
    return num_linear * layer_state_bytes(spec, Shares.of(plan, spec), item_bytes) if num_linear else 0


def held_bytes(spec: Spec, plan: Plan, stage: int, item_bytes: int) -> int:
    """Bytes that a slot has beside its states, for a token and drafts that may have to be taken again: what goes into the
    convolution and the gates."""
    num_linear = num_linear_layers(spec, plan, stage)
    if not num_linear or not plan.mtp:
        return 0
    delta = Shares.of(plan, spec).delta(spec)
    return num_linear * (1 + plan.mtp) * (delta.channels + 2 * delta.num_value_heads) * item_bytes


def layer_state_bytes(spec: Spec, shares: Shares, item_bytes: int) -> int:
    """Of one delta layer: the last inputs of its convolution, and a float32 matrix for each value head."""
    delta = shares.delta(spec)
    matrices = delta.num_value_heads * delta.key_dim * delta.value_dim
    return (delta.kernel - 1) * delta.channels * item_bytes + 4 * matrices


def mailbox_bytes(spec: Spec, plan: Plan, item_bytes: int) -> int:
    """Bytes of a GPU's memory for mail, as parallel/mail.py lays it out: of each strip the gathered rows, and the others' shares of a
    sum of them."""
    return plan.mail_strips * (2 * plan.tp - 1) * ceil(plan.strip_rows / plan.tp) * spec.hidden * item_bytes


def activation_bytes(spec: Spec, plan: Plan, rows: int, samples: int, item_bytes: int) -> int:
    """An estimate of what a step of `rows` rows, `samples` of them sampled, needs on a rank beside weights and pages: the table
    of rotary positions, the residual, and the widest of

        attention        in [n, H], q k v [n, Q + 2K], keys and values along cp [rows, 2K], out [n, Q] and [n, H]; a gate [n, Q]
        delta rule       in [n, H], q k v [n, C], before and after the convolution, z and out [n, V], out [n, H]; along cp values
                         and results are wider by what the state before would add
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
    widest = [near * (2 * spec.hidden + (2 + spec.gated_attention) * q + 2 * kv) + (plan.cp > 1) * rows * 2 * kv]
    if spec.delta is not None:
        delta = shares.delta(spec)
        wide = 2 * delta.num_value_heads * (delta.value_dim + (plan.cp > 1) * delta.key_dim)
        widest.append(near * (2 * spec.hidden + 2 * delta.channels + wide))
    if not all(spec.sparse):
        widest.append(near * (2 * spec.hidden + 3 * spec.intermediate // shares.heads))
    if any(spec.sparse):
        seen = ceil(rows / plan.moe_dp)
        sent = seen * min(spec.num_experts_per_tok, shares.slots_of(spec))
        widest.append(2 * seen * spec.hidden + sent * (2 * spec.hidden + 3 * spec.moe_intermediate // shares.expert))
    residual = ceil(near / plan.tp) if plan.sp else near
    logits = samples * vocabulary_rows(spec, plan, rank=0) * (item_bytes + 4)
    rotary = 4 * spec.max_position_embeddings * (spec.rotary_dim or spec.head_dim)
    return rotary + max(item_bytes * (residual * spec.hidden + max(widest)), logits)
