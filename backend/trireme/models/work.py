"""Work: what each part of a stage computes and moves in one step, in FLOPs and bytes. How long that takes is a device's to say."""

from __future__ import annotations

from typing import NamedTuple

from trireme.models.cost import LayerParams, Shares, layer_state_bytes
from trireme.models.hardware import Device
from trireme.models.spec import Spec

_LOGITS = 12  # bytes that are moved of each: the head writes it in float32, and the sampler reads it twice


class Load(NamedTuple):
    """A step as one rank sees it; fractions where ranks share rows."""

    rows: float  # that it computes
    keys: float  # that each row sees, and each sequence keeps
    sequences: float  # of which it reads keys and values, or reads and writes states
    samples: float  # rows whose logits are computed
    seen: float  # rows that its copy of the experts serves
    picked: float  # of those and the experts of each, what is computed here
    shares_context: bool = False  # along cp: a state is wider by what it would do to any other

    @classmethod
    def alone(cls, spec: Spec, *, rows: float, keys: float, sequences: float) -> Load:
        """On the only rank of a stage."""
        return cls(rows, keys, sequences, sequences, rows, rows * spec.num_experts_per_tok)


class Work(NamedTuple):
    flops: float
    num_bytes: float

    def seconds(self, device: Device, item_bytes: int) -> float:
        """By whichever takes longer, products or memory."""
        return max(self.flops / device.flops(item_bytes), self.num_bytes / (device.bandwidth * device.reach.bandwidth))


def layer_work(spec: Spec, params: LayerParams, *, linear: bool, shares: Shares, load: Load, item_bytes: int) -> Work:
    """Of a layer of these parameters. Two FLOPs for each number and row, and four for each key and number of a query: scores, and
    values by them (sliding windows are not counted). A row of the delta rule meets each number of a state three times. Weights
    are read once, of experts those that rows go to; each sequence's keys and values are read, or its states there and back."""
    flops = 2 * (load.rows * (params.mixer + params.mlp) + load.picked * params.expert)
    num_bytes = item_bytes * read_params(params, touched(spec, round(load.seen)))
    if linear:
        delta = shares.delta(spec)
        flops += 6 * load.rows * delta.num_value_heads * delta.key_dim * (delta.value_dim + load.shares_context * delta.key_dim)
        return Work(flops, num_bytes + 2 * load.sequences * layer_state_bytes(spec, shares, item_bytes))
    flops += 4 * load.rows * load.keys * (spec.num_heads // shares.heads) * spec.head_dim
    return Work(flops, num_bytes + 2 * load.sequences * load.keys * shares.kv_heads(spec) * spec.head_dim * item_bytes)


def head_work(spec: Spec, vocabulary: int, load: Load, item_bytes: int) -> Work:
    """Of the head on a rank that has so many tokens of it, and of sampling."""
    return Work(2 * load.samples * vocabulary * spec.hidden, vocabulary * (spec.hidden * item_bytes + load.samples * _LOGITS))


def touched(spec: Spec, rows: int) -> float:
    """The share of a layer's experts that `rows` rows read, expected of a router that treats all alike:
    1 - (1 - k / E) ** rows.

    8 of 128 experts: 1 row reads 1/16 of them, 16 rows 0.64, 64 rows 0.98.
    """
    return 1 - (1 - spec.num_experts_per_tok / spec.num_experts) ** rows if spec.num_experts else 0.0


def read_params(params: LayerParams, share: float) -> float:
    """Numbers of a layer that a step reads which touches this share of its experts."""
    return params.mixer + params.mlp + share * params.slots * params.expert
