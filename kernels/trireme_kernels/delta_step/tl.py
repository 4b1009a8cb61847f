"""delta_step in the Triton language: one launch, whatever the items are.

A program has an item and a key head, with the value heads that it serves: all that they share is read, and written anew, by
nobody else. It takes TOGETHER of the value heads at a time: their states, side by side in one tile of KEYS x (TOGETHER x VALUES),
stay in registers over all rows.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.delta_step.op import CapturedDeltaStep, DeltaStep
from trireme_kernels.gated_rms_norm.tl import normed_and_gated
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.upload import upload

_TAPS = 4  # of the convolution, the most
_MOST_NUMBERS = 1 << 15  # of a state: 128 registers of each of 256 threads
_FEW_PROGRAMS = 128  # fewer leave most of a GPU idle: each then has all its bytes in flight at once


def fits(case: Case) -> str | None:
    key_dim, value_dim, kernel = (case.sizes.get(name, 1) for name in ("key_dim", "value_dim", "kernel"))
    if next_power_of_2(key_dim) * next_power_of_2(value_dim) > _MOST_NUMBERS:
        return f"a state of {key_dim} x {value_dim} is more than the {_MOST_NUMBERS} numbers that fit in registers"
    if kernel > _TAPS:
        return f"kernel={kernel} is over {_TAPS}"
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
        gate: Tensor,  # [N, Hv, Dv]
        weight: Tensor,  # [C, K]
        log_decay: Tensor,  # [Hv]
        dt_bias: Tensor,  # [Hv]
        norm: Tensor,  # [Dv]
        eps: float,
        inputs: Tensor,  # [S, K - 1, C]
        states: Tensor,  # [S, Hv, Dk, Dv]
        held: Tensor,  # [slots, R, C + 2 Hv]
        slots: Tensor,  # [I]
        fresh: Tensor,  # [I]
        plan: Tensor,
    ) -> Tensor:  # [N, Hv, Dv]
        return launch(qkv, a, b, gate, weight, log_decay, dt_bias, norm, eps, inputs, states, held, slots, fresh, plan)

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
        gate: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        eps: float,
        inputs: Tensor,
        states: Tensor,
        held: Tensor,
        slots: Tensor,
        fresh: Tensor,
    ) -> Tensor:
        return launch(qkv, a, b, gate, weight, log_decay, dt_bias, norm, eps, inputs, states, held, slots, fresh, self._plan)


def tiles(num_programs: int) -> tuple[int, int]:
    """(value heads side by side, at most; warps for _MOST_NUMBERS numbers of the tile, half as many for half of them)."""
    return (2, 8) if num_programs <= _FEW_PROGRAMS else (1, 8)  # the best of a sweep on an H100


def launch(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    eps: float,
    inputs: Tensor,
    states: Tensor,
    held: Tensor,
    slots: Tensor,
    fresh: Tensor,
    plan: Tensor,
) -> Tensor:
    """Rows between one item's and the next one's, and after the last one's, give zeros."""
    rowwise = qkv, a, b, gate, weight, inputs, held
    assert all(x.stride(-1) == 1 for x in rowwise) and states[0].is_contiguous(), "rows and states are contiguous"
    num_items, (num_rows, num_channels) = plan.shape[1], qkv.shape
    num_heads, key_dim, value_dim = states.shape[1:]
    out = torch.empty(num_rows, num_heads, value_dim, dtype=qkv.dtype, device=qkv.device)
    if not num_items:
        return out.zero_()
    num_key_heads = (num_channels - num_heads * value_dim) // (2 * key_dim)
    shared, keys, values = num_heads // num_key_heads, next_power_of_2(key_dim), next_power_of_2(value_dim)
    together, num_warps = tiles(num_items * num_key_heads)
    together = min(together, next_power_of_2(shared), max(1, _MOST_NUMBERS // (keys * values)))
    _delta_step_items[(num_items, num_key_heads)](
        qkv,
        a,
        b,
        gate,
        inputs,
        held,
        slots,
        fresh.view(torch.uint8),
        plan,
        num_items,
        num_rows,
        num_channels,
        qkv.stride(0),
        a.stride(0),
        b.stride(0),
        *gate.stride()[:2],
        *inputs.stride()[:2],
        *held.stride()[:2],
        weight,
        log_decay,
        dt_bias,
        norm,
        eps,
        states,
        out,
        weight.stride(0),
        states.stride(0),
        TAPS=weight.shape[1],
        HEADS=num_heads,
        SHARED=shared,
        DK=key_dim,
        DV=value_dim,
        KEYS=keys,
        VALUES=values,
        TOGETHER=together,
        HELD=held.shape[1] > 0,
        **early(qkv),
        num_warps=max(1, num_warps * keys * values * together // _MOST_NUMBERS),
    )
    return out


# What belongs to items amid a step may begin at any address; of a, b, slots and fresh only single numbers are read, for which that
# makes no other kernel.
@jit(do_not_specialize=["num_items", "num_rows"], do_not_specialize_on_alignment=["a", "b", "slots", "fresh"])
def _delta_step_items(
    qkv, a, b, gate, inputs, held, slots, fresh, plan, num_items, num_rows, num_channels,
    qkv_row, a_row, b_row, gate_row, gate_head, inputs_slot, inputs_row, held_slot, held_row,
    weight, log_decay, dt_bias, norm, eps, states, out, weight_row, states_slot,
    TAPS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, TOGETHER: tl.constexpr, HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    item, key_head = tl.program_id(0), tl.program_id(1)
    # Of the value heads: in a row of the tile's columns, and as a head a line.
    column = tl.arange(0, TOGETHER * VALUES)
    value, line_head, line_value = column % VALUES, tl.arange(0, TOGETHER)[:, None], tl.arange(0, VALUES)[None, :]
    kind = out.dtype.element_ty

    after_earlier(PDL)
    begin, count = tl.load(plan + item).to(tl.int64), tl.load(plan + num_items + item)
    until = tl.where(item + 1 < num_items, tl.load(plan + item + 1), num_rows)
    for row in range(begin + count, until):
        for part in tl.static_range(0, SHARED, TOGETHER):
            target = out + (row * HEADS + key_head * SHARED + part + line_head) * DV + line_value
            tl.store(target, tl.zeros([TOGETHER, VALUES], kind), mask=(part + line_head < SHARED) & (line_value < DV))
    if count == 0:
        return
    replays, holds = count * 0, count < 0
    if HELD:
        replays = tl.load(plan + 2 * num_items + item)
        holds = tl.load(plan + 3 * num_items + item) != 0
    slot, goes_on = tl.load(slots + item), tl.load(fresh + item) == 0
    # Where the inputs of place 0 are: before the item's rows, among what is held, and among this step's rows.
    window, aside, own = inputs + slot * inputs_slot + (TAPS - 1) * inputs_row, held + slot * held_slot, qkv + (begin - replays) * qkv_row

    key = tl.arange(0, KEYS)
    q_channel, k_channel = key_head * DK + key, HEADS // SHARED * DK + key_head * DK + key
    for part in tl.static_range(0, SHARED, TOGETHER):
        head = key_head * SHARED + part + column // VALUES
        real_value = (part + column // VALUES < SHARED) & (value < DV)
        v_channel = 2 * (HEADS // SHARED) * DK + head * DV + value
        place = states + slot * states_slot + (head * (DK * DV) + value)[None, :] + key[:, None] * DV
        real = (key < DK)[:, None] & real_value[None, :]
        state = tl.load(place, mask=_both(real, goes_on), other=0.0)
        rate = -tl.exp(tl.load(log_decay + head, mask=real_value, other=0.0))
        bias = tl.load(dt_bias + head, mask=real_value, other=0.0)
        scale = tl.load(norm + line_value, mask=line_value < DV, other=0.0)

        # Rows that are replayed in a loop of their own: with one for both, and a store in it, ptxas kept whole states in local memory.
        for row in range(replays):
            state = _after(
                row, state, begin, key < DK, head, real_value, k_channel, v_channel, rate, bias, a, b, num_channels, a_row, b_row,
                window, aside, own, goes_on, replays, weight, inputs_row, held_row, qkv_row, weight_row, HEADS, TAPS, HELD,
            )  # fmt: skip
        if HELD and holds:
            tl.store(place, state, mask=real)
        for row in range(replays, replays + count):
            state = _after(
                row, state, begin, key < DK, head, real_value, k_channel, v_channel, rate, bias, a, b, num_channels, a_row, b_row,
                window, aside, own, goes_on, replays, weight, inputs_row, held_row, qkv_row, weight_row, HEADS, TAPS, HELD,
            )  # fmt: skip
            query = _convolved(
                window, aside, own, goes_on, replays, row, q_channel, key < DK, weight,
                inputs_row, held_row, qkv_row, weight_row, TAPS, HELD,
            )  # fmt: skip
            query = query * (tl.rsqrt(tl.sum(query * query) + 1e-6) * DK**-0.5)
            line = begin + (row - replays)
            read = tl.reshape(tl.sum(state * query[:, None], axis=0).to(kind).to(tl.float32), [TOGETHER, VALUES])
            real_line = (part + line_head < SHARED) & (line_value < DV)
            heads = key_head * SHARED + part + line_head
            opening = tl.load(gate + line * gate_row + heads * gate_head + line_value, mask=real_line, other=0.0).to(tl.float32)
            result = normed_and_gated(read, scale, opening, DV, eps, kind)
            tl.store(out + (line * HEADS + heads) * DV + line_value, result, mask=real_line)
        if not HELD or holds == 0:
            tl.store(place, state, mask=real)

        # All that read these values' inputs have done so; the query's and the key's are read until the last values are done.
        tl.debug_barrier()
        _move_on(window, aside, own, goes_on, replays, count, holds, v_channel, real_value, inputs_row, held_row, qkv_row, TAPS, HELD)
        if HELD:
            for row in range(tl.where(holds, count, 0)):
                first, target = real_value & (value == 0), aside + row * held_row + num_channels + head
                tl.store(target, tl.load(a + (begin + row) * a_row + head, mask=first), mask=first)
                tl.store(target + HEADS, tl.load(b + (begin + row) * b_row + head, mask=first), mask=first)
    _move_on(window, aside, own, goes_on, replays, count, holds, q_channel, key < DK, inputs_row, held_row, qkv_row, TAPS, HELD)
    _move_on(window, aside, own, goes_on, replays, count, holds, k_channel, key < DK, inputs_row, held_row, qkv_row, TAPS, HELD)


@triton.jit
def _after(
    row, state, begin, real_key, head, real_value, k_channel, v_channel, rate, bias, a, b, num_channels, a_row, b_row,
    window, aside, own, goes_on, replays, weight, inputs_row, held_row, qkv_row, weight_row,
    HEADS: tl.constexpr, TAPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The state after one more row, held or own."""
    line, again = begin + (row - replays), aside + row * held_row + num_channels
    known = _convolved(
        window, aside, own, goes_on, replays, row, k_channel, real_key, weight,
        inputs_row, held_row, qkv_row, weight_row, TAPS, HELD,
    )  # fmt: skip
    new = _convolved(
        window, aside, own, goes_on, replays, row, v_channel, real_value, weight,
        inputs_row, held_row, qkv_row, weight_row, TAPS, HELD,
    )  # fmt: skip
    time = _either(a + line * a_row, again, head, real_value, row >= replays, HELD)
    learning = _either(b + line * b_row, again + HEADS, head, real_value, row >= replays, HELD)
    time += bias
    time = tl.where(time > 20.0, time, tl.log(1.0 + tl.exp(time)))  # softplus
    known = known * tl.rsqrt(tl.sum(known * known) + 1e-6)
    state = state * tl.exp(rate * time)[None, :]
    learnt = (new - tl.sum(state * known[:, None], axis=0)) * tl.sigmoid(learning)
    return state + known[:, None] * learnt[None, :]


@triton.jit
def _both(real, condition):
    """A mask where a condition on the whole program holds, nothing elsewhere."""
    return real & (tl.where(condition, 1, 0) > tl.zeros(real.shape, tl.int32))


@triton.jit
def _either(row, again, place, real, own, HELD: tl.constexpr):
    """float32 numbers of one of the item's own rows, or of a row that was held."""
    value = tl.load(row + place, mask=_both(real, own), other=0.0).to(tl.float32)
    if HELD:
        value += tl.load(again + place, mask=_both(real, own == 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def _inputs(window, aside, own, goes_on, replays, place, channel, real, inputs_row, held_row, own_row, HELD: tl.constexpr):
    """Channels of an item's inputs, place by place: below 0 of the rows before, then of `replays` held rows, then of its own."""
    before = tl.where(goes_on, 0, -(1 << 30))  # of a fresh item there is nothing
    value = tl.load(window + place * inputs_row + channel, mask=real & (place < before), other=0.0)
    if HELD:
        value += tl.load(aside + place * held_row + channel, mask=real & (place >= 0) & (place < replays), other=0.0)
    return value + tl.load(own + place.to(tl.int64) * own_row + channel, mask=real & (place >= replays), other=0.0)


@triton.jit
def _convolved(
    window, aside, own, goes_on, replays, row, channel, real, weight, inputs_row, held_row, own_row, weight_row,
    TAPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """float32 of what causal_conv makes of some channels of a row. A tile of taps and channels: channels alone would be laid out as the
    state's rows are, all of them in every thread."""
    tap, channels = tl.arange(0, 4)[:, None], channel[None, :]
    real = real[None, :] & (tap < TAPS)
    value = _inputs(window, aside, own, goes_on, replays, row + tap - (TAPS - 1), channels, real, inputs_row, held_row, own_row, HELD)
    total = tl.sum(value.to(tl.float32) * tl.load(weight + channels * weight_row + tap, mask=real, other=0.0).to(tl.float32), axis=0)
    return (total * tl.sigmoid(total)).to(own.dtype.element_ty).to(tl.float32)


@triton.jit
def _move_on(
    window, aside, own, goes_on, replays, count, holds, channel, real, inputs_row, held_row, own_row,
    TAPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Some channels of the rows before the next one, and where the item holds of its own rows, to where they are kept."""
    row, channels = tl.arange(0, 4)[:, None], channel[None, :]
    moved = real[None, :] & (row < TAPS - 1)
    place = replays + tl.where(holds, 0, count) - (TAPS - 1) + row
    value = _inputs(window, aside, own, goes_on, replays, place, channels, moved, inputs_row, held_row, own_row, HELD)
    tl.debug_barrier()  # what follows overwrites what was read
    tl.store(window + (row - (TAPS - 1)) * inputs_row + channels, value, mask=moved)
    if HELD:
        for start in range(0, tl.where(holds, count, 0), 4):
            here = real[None, :] & (start + row < count)
            value = tl.load(own + (replays + start + row).to(tl.int64) * own_row + channels, mask=here, other=0.0)
            tl.store(aside + (start + row) * held_row + channels, value, mask=here)
