"""Where stages part: published shapes, what weighs on which stage, and that no cut is better."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.test_plan import SPEC
from real_configs import QWEN3_5_35B, QWEN3_8B, QWEN3_30B
from tiny import tiny_config
from trireme.core.settings import make_settings
from trireme.models.cut import Mix, balance, cut_for, cut_layers
from trireme.models.hardware import DEVICES
from trireme.models.spec import Spec, make_spec

H100 = DEVICES["H100"]
BENCH: dict[str, Any] = {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192}  # of issue 4


def spec_of(family: str, **overrides: Any) -> Spec:
    return make_spec(tiny_config(family, **overrides).to_dict())


def cut_of(spec: Spec, num_stages: int = 2, *, mtp: bool = False, **settings: Any) -> list[int]:
    return cut_layers(spec, make_settings({"model": "/m", "pipeline_parallel_size": num_stages, **settings}), mtp=mtp)


def test_qwen3_8b_on_two_h100s():
    """Measured with the settings of issue 4, steps of 128 sequences at 1.1K keys: a layer 0.375 ms, head and sampling 0.58, so that
    [20, 16] took 7.53 and 6.57 ms, [18, 18] 6.79 and 7.34."""
    assert cut_of(make_spec(QWEN3_8B), **BENCH) == [19, 17]


@pytest.mark.parametrize("settings", [{}, BENCH])
def test_mixtures_are_cut_in_the_middle(settings: dict):
    """Their steps read every expert, so the head weighs half of a layer; one that drafts is a layer more."""
    assert cut_of(make_spec(QWEN3_30B), **settings) == [24, 24]
    assert [cut_of(make_spec(QWEN3_5_35B), mtp=mtp, **settings) for mtp in (False, True)] == [[20, 20], [21, 19]]


def test_a_small_model_with_many_words_keeps_fewer_layers_last():
    """SmolLM2-135M: its head weighs as much as eight layers, less where these read keys and values, and in prompts nothing."""
    assert cut_of(SPEC, 1) == [30]
    assert cut_of(SPEC) == [16, 14]
    assert cut_of(replace(SPEC, vocab_size=4 * SPEC.vocab_size)) == [20, 10]
    assert cut_of(SPEC, 30) == [1] * 30


def test_a_cut_follows_what_steps_hold():
    """The head is read once in a step of however many rows; keys and values by each."""
    spec = make_spec(QWEN3_8B)
    few, many, far = Mix(rows=2, context=1024, chunk=8192), Mix(512, 1024, 8192), Mix(128, 16384, 8192)
    assert [cut_for(spec, 2, mix, H100, 2) for mix in (few, many, far)] == [[20, 16], [18, 18], [18, 18]]


def test_settings_say_what_steps_hold():
    assert Mix.of(make_settings({"model": "/m", "pipeline_parallel_size": 2, **BENCH}), SPEC) == Mix(128, 1024, 8192)
    small = {"max_model_len": 500, "max_num_seqs": 9, "max_num_batched_tokens": 64}
    assert Mix.of(make_settings({"model": "/m", "pipeline_parallel_size": 2, **small}), SPEC) == Mix(32, 250, 64)
    assert Mix.of(make_settings({"model": "/m", "max_micro_batch_size": 48}), SPEC).rows == 48


def test_a_cpu_has_other_ratios_of_products_to_memory():
    """Of 30B's experts a CPU reads as many, but multiplies longer than it reads, and the head with all rows."""
    assert [cut_of(make_spec(QWEN3_30B), device=device) for device in ("cpu", "cuda")] == [[25, 23], [24, 24]]


def test_states_and_keys_weigh_on_a_cut():
    """Two layers of attention, then two whose states each row reads and writes: those of a few rows weigh nothing, and those of many
    less than so many times many keys."""
    kinds = ["full_attention"] * 2 + ["linear_attention"] * 2
    spec = spec_of("qwen3_5", layer_types=kinds, num_hidden_layers=4, linear_key_head_dim=32, linear_value_head_dim=32, vocab_size=8)
    mixes = [Mix(rows=1, context=16, chunk=4096), Mix(100, 16, 4096), Mix(100, 512, 4096)]
    assert [cut_for(spec, 2, mix, H100, 4) for mix in mixes] == [[2, 2], [3, 1], [1, 3]]


def test_experts_weigh_what_a_step_reads_of_them():
    """Two dense layers, then four with 8 experts of which a row reads one. Alone, a row finds all layers alike, so the cut is
    even; a step of many rows reads every expert, and the layers that have them weigh nine."""
    sizes = {"num_hidden_layers": 6, "mlp_only_layers": [0, 1], "num_experts": 8, "num_experts_per_tok": 1}
    spec = spec_of("qwen3_moe", **sizes, intermediate_size=90, moe_intermediate_size=90, vocab_size=8)
    assert cut_for(spec, 2, Mix(rows=1, context=1, chunk=4096), H100, 4) == [3, 3]
    assert cut_for(spec, 2, Mix(rows=40, context=1, chunk=4096), H100, 4) == [4, 2]


def test_a_head_heavier_than_a_stage_leaves_one_layer():
    assert balance([1] * 6, 100, 3) == [3, 2, 1] or balance([1] * 6, 100, 3) == [2, 3, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.data())
def test_no_cut_is_better(costs: list[int], tail: int, data: st.DataObject):
    num_stages = data.draw(st.integers(1, len(costs)))

    def dearest(cut: list[int]) -> int:
        ends = [sum(cut[: stage + 1]) for stage in range(num_stages)]
        return max(sum(costs[end - count : end]) + tail * (end == len(costs)) for end, count in zip(ends, cut, strict=True))

    cuts = [[b - a for a, b in pairwise((0, *places, len(costs)))] for places in combinations(range(1, len(costs)), num_stages - 1)]
    assert dearest(balance(costs, tail, num_stages)) == min(map(dearest, cuts))
