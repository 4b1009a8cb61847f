"""delta_step in the Triton language: two launches, whatever the items are.

The first has a program for each item, value head and block of value dims: its part of the state stays in registers over all
rows, and it convolves the channels of its query, key and values itself. The second moves on what the programs of an item
share, the inputs and what is held, when all have read it: a program for each item and block of channels.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.delta_step.op import CapturedDeltaStep, DeltaStep
from trireme_kernels.upload import upload

_VALUES, _CHANNELS = 32, 512  # of a program


def fits(case: Case) -> str | None:
    if case.sizes.get("key_dim", 0) > 256:
        return f"key_dim={case.sizes['key_dim']} is over 256"
    return None


def build(case: Case) -> DeltaStep:
    return Fused(case)


class Fused:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray, replays: np.ndarray, holds: np.ndarray) -> Tensor:
        """int32 [4, I]: first row, rows, replayed rows, whether rows are held."""
        counts = np.asarray(counts)
        return self.laid_out(np.cumsum(counts) - counts, counts, replays, holds)

    def laid_out(self, *numbers: np.ndarray) -> Tensor:
        return upload(np.stack(numbers).astype(np.int32), self.device)

    def run(
        self,
        qkv: Tensor,  # [N, C]
        a: Tensor,  # [N, Hv]
        b: Tensor,  # [N, Hv]
        weight: Tensor,  # [C, K]
        log_decay: Tensor,  # [Hv]
        dt_bias: Tensor,  # [Hv]
        inputs: Tensor,  # [S, K - 1, C]
        states: Tensor,  # [S, Hv, Dk, Dv]
        held: Tensor,  # [slots, R, C + 2 Hv]
        slots: Tensor,  # [I]
        fresh: Tensor,  # [I]
        plan: Tensor,
    ) -> Tensor:  # [N, Hv, Dv]
        out = torch.empty(len(qkv), *a.shape[1:], states.shape[3], dtype=qkv.dtype, device=qkv.device)
        return launch(qkv, a, b, weight, log_decay, dt_bias, inputs, states, held, slots, fresh, plan, out)

    def captured(self, num_items: int, width: int) -> CapturedDeltaStep:
        return _Captured(self, num_items, width)


class _Captured:
    def __init__(self, op: Fused, num_items: int, width: int):
        self._op, self._plan = op, torch.zeros(4, num_items, dtype=torch.int32, device=op.device)
        self._firsts = np.arange(num_items) * width

    def plan(self, counts: np.ndarray, replays: np.ndarray, holds: np.ndarray) -> None:
        more = (0, len(self._firsts) - len(counts))
        numbers = (np.pad(np.asarray(each), more) for each in (counts, replays, holds))
        self._plan.copy_(self._op.laid_out(self._firsts, *numbers), non_blocking=True)

    def run(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        dt_bias: Tensor,
        inputs: Tensor,
        states: Tensor,
        held: Tensor,
        slots: Tensor,
        fresh: Tensor,
    ) -> Tensor:
        out = torch.zeros(len(qkv), *a.shape[1:], states.shape[3], dtype=qkv.dtype, device=qkv.device)  # some rows are of no item
        return launch(qkv, a, b, weight, log_decay, dt_bias, inputs, states, held, slots, fresh, self._plan, out)


def launch(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    dt_bias: Tensor,
    inputs: Tensor,
    states: Tensor,
    held: Tensor,
    slots: Tensor,
    fresh: Tensor,
    plan: Tensor,
    out: Tensor,
) -> Tensor:
    """Both launches; writes and gives `out`."""
    rowwise = qkv, a, b, weight, inputs, held
    assert all(x.stride(-1) == 1 for x in rowwise) and states[0].is_contiguous(), "rows and states are contiguous"
    num_items, num_channels = plan.shape[1], qkv.shape[1]
    num_heads, key_dim, value_dim = states.shape[1:]
    if not num_items:
        return out
    sources = (qkv, a, b, inputs, held, slots, fresh.view(torch.uint8), plan, num_items, num_channels)
    strides = (qkv.stride(0), a.stride(0), b.stride(0), *inputs.stride()[:2], *held.stride()[:2])
    sizes = {"TAPS": weight.shape[1], "HEADS": num_heads}
    _step[(num_items, num_heads, triton.cdiv(value_dim, _VALUES))](
        *sources,
        *strides,
        weight,
        log_decay,
        dt_bias,
        states,
        out,
        weight.stride(0),
        states.stride(0),
        **sizes,
        SHARED=num_heads * 2 * key_dim // (num_channels - num_heads * value_dim),
        DK=key_dim,
        DV=value_dim,
        KEYS=triton.next_power_of_2(key_dim),
        VALUES=_VALUES,
    )
    rows = triton.next_power_of_2(weight.shape[1] - 1)
    _move_on[(num_items, triton.cdiv(num_channels + 2 * num_heads, _CHANNELS))](*sources, *strides, **sizes, ROWS=rows, CHANNELS=_CHANNELS)
    return out


@triton.jit
def _step(
    qkv, a, b, inputs, held, slots, fresh, plan, num_items, num_channels,
    qkv_row, a_row, b_row, inputs_slot, inputs_row, held_slot, held_row,
    weight, log_decay, dt_bias, states, out, weight_row, states_slot,
    TAPS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(plan + item).to(tl.int64)
    count = tl.load(plan + num_items + item)
    replays = tl.load(plan + 2 * num_items + item)
    holds = tl.load(plan + 3 * num_items + item) != 0
    if count + replays == 0:
        return
    slot = tl.load(slots + item)
    goes_on = tl.load(fresh + item) == 0
    # Where the inputs of place 0 are: before the item's rows, among what is held, and among this step's rows.
    window = inputs + slot * inputs_slot + (TAPS - 1) * inputs_row
    aside = held + slot * held_slot
    own = qkv + (begin - replays) * qkv_row

    key, value = tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    real_key, real_value = key < DK, value < DV
    q_channel = head // SHARED * DK + key
    k_channel = HEADS // SHARED * DK + q_channel
    v_channel = 2 * (HEADS // SHARED) * DK + head * DV + value
    place = states + slot * states_slot + head * DK * DV + key[:, None] * DV + value[None, :]
    real = real_key[:, None] & real_value[None, :]
    state = tl.where(goes_on, tl.load(place, mask=real, other=0.0), 0.0)
    rate, bias = -tl.exp(tl.load(log_decay + head)), tl.load(dt_bias + head)
    kind = out.dtype.element_ty

    for row in range(replays + count):
        if holds & (row == replays):
            tl.store(place, state, mask=real)
        q = _convolved(
            window, aside, own, goes_on, replays, row, q_channel, real_key, weight, inputs_row, held_row, qkv_row, weight_row, TAPS
        )
        k = _convolved(
            window, aside, own, goes_on, replays, row, k_channel, real_key, weight, inputs_row, held_row, qkv_row, weight_row, TAPS
        )
        v = _convolved(
            window, aside, own, goes_on, replays, row, v_channel, real_value, weight, inputs_row, held_row, qkv_row, weight_row, TAPS
        )
        if row < replays:
            logits = aside + row * held_row + num_channels + head
            time, learning = tl.load(logits).to(tl.float32), tl.load(logits + HEADS).to(tl.float32)
        else:
            line = begin + (row - replays)
            time, learning = tl.load(a + line * a_row + head).to(tl.float32), tl.load(b + line * b_row + head).to(tl.float32)
        time += bias
        time = tl.where(time > 20.0, time, tl.log(1.0 + tl.exp(time)))  # softplus
        q, k = q.to(kind).to(tl.float32), k.to(kind).to(tl.float32)
        q = q * (tl.rsqrt(tl.sum(q * q) + 1e-6) * DK**-0.5)
        k = k * tl.rsqrt(tl.sum(k * k) + 1e-6)
        state = state * tl.exp(rate * time)
        learnt = (v.to(kind).to(tl.float32) - tl.sum(state * k[:, None], axis=0)) * tl.sigmoid(learning)
        state = state + k[:, None] * learnt[None, :]
        if row >= replays:
            result = tl.sum(state * q[:, None], axis=0).to(kind)
            tl.store(out + ((begin + (row - replays)) * HEADS + head) * DV + value, result, mask=real_value)
    if holds == 0:
        tl.store(place, state, mask=real)


@triton.jit
def _convolved(
    window, aside, own, goes_on, replays, row, channel, real, weight, inputs_row, held_row, own_row, weight_row,
    TAPS: tl.constexpr,
):  # fmt: skip
    """What causal_conv makes of some channels of a row."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        place = row + tap - (TAPS - 1)
        value = _input(window, aside, own, goes_on, replays, place, channel, real, inputs_row, held_row, own_row)
        total += value.to(tl.float32) * tl.load(weight + channel * weight_row + tap, mask=real, other=0.0).to(tl.float32)
    return total * tl.sigmoid(total)


@triton.jit
def _input(window, aside, own, goes_on, replays, place, channel, real, inputs_row, held_row, own_row):
    """Channels of an item's input: below place 0 of the rows before, then of `replays` held rows, then of its own."""
    place = place.to(tl.int64)
    if place < 0:
        value = tl.where(goes_on, tl.load(window + place * inputs_row + channel, mask=real, other=0.0), 0.0)
    elif place < replays:
        value = tl.load(aside + place * held_row + channel, mask=real, other=0.0)
    else:
        value = tl.load(own + place * own_row + channel, mask=real, other=0.0)
    return value


@triton.jit
def _move_on(
    qkv, a, b, inputs, held, slots, fresh, plan, num_items, num_channels,
    qkv_row, a_row, b_row, inputs_slot, inputs_row, held_slot, held_row,
    TAPS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    begin = tl.load(plan + item).to(tl.int64)
    count = tl.load(plan + num_items + item)
    replays = tl.load(plan + 2 * num_items + item)
    holds = tl.load(plan + 3 * num_items + item) != 0
    if count + replays == 0:
        return
    slot = tl.load(slots + item)
    goes_on = tl.load(fresh + item) == 0
    window = inputs + slot * inputs_slot + (TAPS - 1) * inputs_row
    aside = held + slot * held_slot
    own = qkv + (begin - replays) * qkv_row
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    convolved = channel < num_channels

    row = tl.arange(0, ROWS)[:, None]
    place = replays + tl.where(holds, 0, count) - (TAPS - 1) + row
    moved = convolved & (row < TAPS - 1)
    before = tl.load(window + place * inputs_row + channel, mask=moved & (place < 0), other=0.0)
    before = tl.where(goes_on, before, 0.0)
    again = tl.load(aside + place * held_row + channel, mask=moved & (place >= 0) & (place < replays), other=0.0)
    new = tl.load(own + place * qkv_row + channel, mask=moved & (place >= replays), other=0.0)
    tl.debug_barrier()  # what follows overwrites what was read
    tl.store(window + (row - (TAPS - 1)) * inputs_row + channel, before + again + new, mask=moved)
    if holds:
        logit = channel - num_channels
        first, second = (logit >= 0) & (logit < HEADS), (logit >= HEADS) & (logit < 2 * HEADS)
        for start in range(0, count, ROWS):
            line, real = begin + start + row, start + row < count
            value = tl.load(qkv + line * qkv_row + channel, mask=real & convolved, other=0.0)
            value += tl.load(a + line * a_row + logit, mask=real & first, other=0.0)
            value += tl.load(b + line * b_row + logit - HEADS, mask=real & second, other=0.0)
            tl.store(aside + (start + row) * held_row + channel, value, mask=real & (logit < 2 * HEADS))
