"""The cost model: worked examples of the cut, and bytes that equal what stages really hold."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chained import build_decoder
from parallel.test_plan import SPEC
from tiny import FAMILIES, tiny_checkpoint
from trireme.models.cost import balance, cut_layers, param_bytes
from trireme.models.spec import read_spec


def test_the_head_weighs_on_the_last_stage():
    """SmolLM2-135M: the head weighs 8 layers, so 38 are dealt out."""
    assert cut_layers(SPEC, 1) == [30]
    assert cut_layers(SPEC, 2) == [19, 11]
    assert cut_layers(SPEC, 30) == [1] * 30


def test_a_head_heavier_than_a_stage_leaves_one_layer():
    assert balance([1] * 6, 100, 3) == [3, 2, 1] or balance([1] * 6, 100, 3) == [2, 3, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.data())
def test_no_cut_is_better(costs: list[int], tail: int, data: st.DataObject):
    num_stages = data.draw(st.integers(1, len(costs)))

    def dearest(cut: list[int]) -> int:
        ends = [sum(cut[: stage + 1]) for stage in range(num_stages)]
        return max(sum(costs[end - count : end]) + tail * (end == len(costs)) for end, count in zip(ends, cut, strict=True))

    cuts = [
        [b - a for a, b in zip((0, *places), (*places, len(costs)), strict=True)]
        for places in combinations(range(1, len(costs)), num_stages - 1)
    ]
    assert dearest(balance(costs, tail, num_stages)) == min(map(dearest, cuts))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_the_bytes_that_the_model_says(family: str, tied: bool, tmp_path: Path):
    biases = {"attention_bias": True} if family != "qwen2" else {}
    tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied, **biases)
    spec = read_spec(tmp_path)
    for cut in ([5], [2, 3], [1, 3, 1]):
        for stage in range(len(cut)):
            params = dict(build_decoder(tmp_path, cut, stage).params())
            assert sum(param.nbytes for param in params.values()) == param_bytes(spec, cut, stage, 4)
