"""What a step computes and moves, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from real_configs import QWEN3_5_35B, QWEN3_8B, QWEN3_30B
from trireme.models.cost import ALONE, Kind, Shares, layer_params
from trireme.models.hardware import DEVICES, Reach
from trireme.models.spec import Spec, make_spec
from trireme.models.work import Load, Work, head_work, layer_work, touched


def layer_of(spec: Spec, kind: Kind, load: Load, shares: Shares = ALONE) -> Work:
    return layer_work(spec, layer_params(spec, kind, shares), linear=kind.linear, shares=shares, load=load, item_bytes=2)


def test_attention_reads_keys_and_values_of_each_sequence():
    """Qwen3-8B: 8 key/value heads and 32 of queries, of 128 numbers."""
    spec = make_spec(QWEN3_8B)
    none, some = (layer_of(spec, Kind(), Load.alone(spec, rows=4, keys=keys, sequences=4)) for keys in (0, 1000))
    assert none == Work(4 * 2 * layer_params(spec, Kind()).held, 2 * layer_params(spec, Kind()).held)
    assert some.num_bytes - none.num_bytes == 4 * 1000 * 2 * 8 * 128 * 2
    assert some.flops - none.flops == 4 * 4 * 1000 * 32 * 128


def test_ranks_share_a_layer():
    spec = make_spec(QWEN3_8B)
    load = Load.alone(spec, rows=64, keys=1000, sequences=64)
    whole, half = layer_of(spec, Kind(), load), layer_of(spec, Kind(), load, Shares(heads=2))
    assert half == pytest.approx((whole.flops / 2, whole.num_bytes / 2), rel=1e-3)  # norms are whole on each


def test_the_delta_rule_reads_and_writes_states():
    """Qwen3.5-35B-A3B: 32 states of 128 x 128 in float32, and the convolution's last three inputs of 8192."""
    spec = make_spec(QWEN3_5_35B)
    plain, linear = (
        [layer_of(spec, Kind(True, linear), Load.alone(spec, rows=1, keys=0, sequences=each)).num_bytes for each in (0, 7)]
        for linear in (False, True)
    )
    assert plain[0] == plain[1]
    assert linear[1] - linear[0] == 7 * 2 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)


def test_experts_are_read_once_and_multiply_their_rows():
    spec = make_spec(QWEN3_30B)
    params, load = layer_params(spec, Kind(sparse=True)), Load.alone(spec, rows=16, keys=0, sequences=16)
    common, expert = params.mixer + params.mlp, 3 * 2048 * 768
    work = layer_of(spec, Kind(sparse=True), load)
    assert work.flops == 2 * 16 * (common + 8 * expert)
    assert work.num_bytes == pytest.approx(2 * (common + 0.6439 * 128 * expert), rel=1e-4)


def test_rows_touch_few_experts_or_all():
    assert [round(touched(make_spec(QWEN3_30B), rows), 4) for rows in (0, 1, 16, 64)] == [0, 0.0625, 0.6439, 0.9839]
    assert touched(make_spec(QWEN3_8B), 8) == 0


def test_a_head_is_read_once_and_writes_logits():
    spec = make_spec(QWEN3_8B)
    load = Load.alone(spec, rows=8, keys=1, sequences=8)
    assert head_work(spec, 1000, load, 2) == Work(2 * 8 * 1000 * 4096, 1000 * (4096 * 2 + 8 * 12))


def test_a_part_takes_as_long_as_its_products_or_its_bytes():
    sheet = replace(DEVICES["H100"], flops_16=1e12, bandwidth=1e9, reach=Reach(flops=0.5, bandwidth=0.5))
    assert [Work(1e12, num_bytes).seconds(sheet, 2) for num_bytes in (0, 5e8, 2e9)] == [2, 2, 4]
