"""Cut: where the stages of a pipeline part, so that the slowest one has least to do. Predicts; measures nothing."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.cost import ALONE, Kind, LayerParams, layer_params, mtp_params
from trireme.models.hardware import DEVICES, Device
from trireme.models.spec import ITEM_BYTES, Spec
from trireme.models.work import Load, Work, head_work, layer_work

_CONTEXT = 1024  # tokens of a sequence halfway through its answer, where half of max_model_len is no less
_ROWS = 32  # of a decode step at the least: with fewer a pipeline is there for its memory, which even cuts fill alike
_TICK_S = 1e-15  # in whole ones of which costs are summed, so that no order of summing changes a cut


class Mix(NamedTuple):
    """What stages typically compute: for each token that is answered a row of a decode step, and a row of a prompt."""

    rows: int  # of a decode step, a sequence each
    context: int  # keys of each
    chunk: int  # rows of a prompt step

    @classmethod
    def of(cls, settings: Settings, spec: Spec) -> Mix:
        """With as many sequences as may run, dealt out over the stages."""
        return cls(
            rows=max(_ROWS, settings.max_micro_batch_size or -(-settings.max_num_seqs // settings.num_stages)),
            context=max(1, min(_CONTEXT, (settings.max_model_len or spec.max_position_embeddings) // 2)),
            chunk=settings.max_num_batched_tokens,
        )


def cut_layers(spec: Spec, settings: Settings, *, mtp: bool = False) -> list[int]:
    """Layers of each stage, such that the slowest one is fastest for the settings' Mix. Where they are not for CPUs an H100 stands
    for any GPU, wherever this is asked: front, stages and planner must agree, and only ratios of parts count. Where a head
    drafts (`mtp`), every step passes through its layer once.

    Qwen3-8B (36 layers; 256 sequences, prompt steps of 8192 rows) on two stages: [19, 17].
    """
    device = DEVICES["CPU" if settings.device == "cpu" else "H100"]
    auto = 4 if settings.device == "cpu" else spec.item_bytes
    item_bytes = auto if settings.dtype == "auto" else ITEM_BYTES[settings.dtype]
    return cut_for(spec, settings.num_stages, Mix.of(settings, spec), device, item_bytes, mtp=mtp)


def cut_for(spec: Spec, num_stages: int, mix: Mix, device: Device, item_bytes: int, *, mtp: bool = False) -> list[int]:
    """The same for a Mix. The ranks of a stage share all parts alike, so one has the whole. A part costs what a row of each kind of
    step costs in it: so the head, which a decode step reads whole, weighs on the last stage, the more the fewer rows there are;
    keys, values and states weigh on their layers; and the embedding, of which rows read a vector each, weighs nothing."""
    if num_stages > spec.num_layers:
        raise Refusal(
            f"{num_stages} stages for {spec.num_layers} layers",
            why="every stage needs a layer",
            fix=f"set pipeline_parallel_size to at most {spec.num_layers}",
        )
    decode = Load.alone(spec, rows=mix.rows, keys=mix.context, sequences=mix.rows)
    prompts = Load.alone(spec, rows=mix.chunk, keys=mix.context / 2, sequences=mix.chunk / mix.context)

    def ticks(in_decode: Work, in_prompts: Work) -> int:
        seconds = in_decode.seconds(device, item_bytes) / mix.rows + in_prompts.seconds(device, item_bytes) / mix.chunk
        return round(seconds / _TICK_S)

    def layer(params: LayerParams, linear: bool) -> int:
        works = [layer_work(spec, params, linear=linear, shares=ALONE, load=load, item_bytes=item_bytes) for load in (decode, prompts)]
        return ticks(*works)

    cost = cache(lambda kind: layer(layer_params(spec, kind), kind.linear))
    tail = ticks(*(head_work(spec, spec.vocab_size, load, item_bytes) for load in (decode, prompts)))
    tail += layer(mtp_params(spec), linear=False) if mtp else 0
    return balance([cost(Kind.of(spec, each)) for each in range(spec.num_layers)], tail, num_stages)


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
