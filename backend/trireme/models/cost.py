"""Cost: the bytes that a cut of layers holds and reads. Decides where stages part; measures nothing."""

from __future__ import annotations

from functools import cache

from trireme.core.refusal import Refusal
from trireme.models.spec import Spec


def layer_params(spec: Spec) -> int:
    """Numbers in one layer."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = spec.hidden * (q + 2 * kv) + q * spec.hidden
    attention += spec.qkv_bias * (q + 2 * kv) + spec.o_bias * spec.hidden + spec.qk_norm * 2 * spec.head_dim
    mlp = 3 * spec.hidden * spec.intermediate + spec.mlp_bias * (2 * spec.intermediate + spec.hidden)
    return attention + mlp + 2 * spec.hidden


def param_bytes(spec: Spec, layer_cut: list[int] | tuple[int, ...], stage: int, item_bytes: int) -> int:
    """Bytes of parameters that a stage holds: its layers, the embedding if first, norm and head if last (the head shares a
    tied embedding only where one stage has both)."""
    first, last = stage == 0, stage == len(layer_cut) - 1
    vocabulary = spec.vocab_size * spec.hidden
    num_vocabularies = first + last - (first and last and spec.tie_word_embeddings)
    return item_bytes * (layer_cut[stage] * layer_params(spec) + num_vocabularies * vocabulary + last * spec.hidden)


def cut_layers(spec: Spec, num_stages: int) -> list[int]:
    """Layers of each stage such that the slowest decode step is fastest. A decode step reads every weight once, but of the
    embedding only its rows' vectors: so the head weighs on the last stage and the embedding on none.

    SmolLM2-135M (30 layers; the head weighs as much as 8): [19, 11].
    """
    if num_stages > spec.num_layers:
        raise Refusal(
            f"{num_stages} stages for {spec.num_layers} layers",
            why="every stage needs a layer",
            fix=f"set pipeline_parallel_size to at most {spec.num_layers}",
        )
    return balance([layer_params(spec)] * spec.num_layers, spec.vocab_size * spec.hidden, num_stages)


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
