"""Kernel time: what steps on a device were made of, by groups of kernels. Holds the one table from names to groups; measures nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OTHER = "other"
MIXTURE = ("experts: products", "experts: route, sort, combine")
SUMS = ("sums by peers, and their norms", "sums and gathers")
# Kernels that may wait for another rank on a stream of their own, beside kernels that compute.
WAITING = (SUMS[1], "send and receive")
# The first pattern that is found in a kernel's name decides. Ours are named for their op (a house rule); a replayed graph tells no more
# than names, so that a product of the head is a product, and a collective's group is not known. On a CPU the names are torch's ops.
GROUPS: tuple[tuple[str, str], ...] = (
    (
        "products",
        r"^_(linear|swiglu)_|nvjet|cublas|cutlass.*gemm|gemm|gemv|splitKreduce|^aten::(mm|addmm|bmm|matmul|linear)$|^mkldnn::.*linear",
    ),
    ("attention", r"^_paged_attention_|flashinfer|flash|^aten::.*(attention|softmax)"),
    ("experts: products", r"^_grouped_mlp_"),
    ("experts: route, sort, combine", r"^_(route|pick_slots|sort_by_slot|combine_experts)_"),
    ("delta rule and convolution", r"^_(delta_step|gated_delta|causal_conv)_|delta_rule|^chunk_|^recompute_w_u|solve_tril|causal_conv"),
    ("norms", r"^_(rms_norm|add_rms_norm|gated_rms_norm)_|^aten::rms_norm$"),
    ("q/k norm, rope, cache write", r"^_qk_rope_write_"),
    ("activation", r"^_(silu_mul|sigmoid_mul)_|^aten::silu"),
    (SUMS[0], r"^_peer_sum_"),
    (WAITING[0], r"nccl.*(AllReduce|AllGather|ReduceScatter|Broadcast)|^gloo:all_"),
    (WAITING[1], r"nccl|^gloo:"),
    ("sampling", r"^_(sample|penalise)_|ArgMax|MaxOps|^aten::(argmax|max)$"),
    ("copies", r"^Mem(cpy|set)|^aten::(copy_|_to_copy)$"),
)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


class Kernels(NamedTuple):
    """Launches on one device, nanoseconds of any clock."""

    names: Sequence[str]  # by number
    which: np.ndarray  # int [n], numbers of names
    starts: np.ndarray  # int64 [n]
    ends: np.ndarray  # int64 [n]


class Spent(NamedTuple):
    """Of one name or group of kernels, for each step."""

    name: str
    group: str
    launches: float
    ms: float  # in which it was what the device was at: these and the idle time add up to the step
    sum_ms: float  # from each start to its end, also where kernels overlap: one that starts early waits for the one before it


class Window(NamedTuple):
    """What some steps in a row were made of."""

    steps: int
    step_ms: float
    idle_ms: float  # of each step: no kernel was under way
    kernels: list[Spent]  # by name, the longest first

    @property
    def groups(self) -> list[Spent]:
        """The same by group, the longest first."""
        found: dict[str, Spent] = {}
        for each in self.kernels:
            had = found.get(each.group, Spent(each.group, each.group, 0.0, 0.0, 0.0))
            found[each.group] = had._replace(launches=had.launches + each.launches, ms=had.ms + each.ms, sum_ms=had.sum_ms + each.sum_ms)
        return sorted(found.values(), key=lambda spent: -spent.ms)


def look_at(kernels: Kernels, marks: Sequence[int]) -> Window:
    """What the steps between marks were made of: nanoseconds of the kernels' clock, one more than steps."""
    begin, end, steps = marks[0], marks[-1], len(marks) - 1
    inside = (kernels.starts < end) & (kernels.ends > begin)
    which = kernels.which[inside]
    starts = np.clip(kernels.starts[inside] - begin, 0, end - begin)
    ends = np.clip(kernels.ends[inside] - begin, 0, end - begin)
    groups = [group_of(name) for name in kernels.names]
    waits = np.array([group in WAITING for group in groups], bool)[which]
    own = _own(starts, ends, waits)
    launches, own_ns, sum_ns = (np.bincount(which, each, len(groups)) for each in (None, own, ends - starts))
    spent = [
        Spent(name, group, launches[at] / steps, own_ns[at] / steps / 1e6, sum_ns[at] / steps / 1e6)
        for at, (name, group) in enumerate(zip(kernels.names, groups, strict=True))
        if launches[at]
    ]
    step_ms = (end - begin) / steps / 1e6
    return Window(steps, step_ms, step_ms - own.sum() / steps / 1e6, sorted(spent, key=lambda each: -each.ms))


def _own(starts: np.ndarray, ends: np.ndarray, waits: np.ndarray) -> np.ndarray:
    """int64 [n], the part of each kernel's nanoseconds that is told of it alone, so that parts add up to the time in which any ran:
    where kernels overlap the one that started first has it, for those after it wait for it; and one of `waits`, bool [n], has only
    what no other has.

    >>> _own(np.array([0, 1, 2]), np.array([3, 5, 9]), np.array([False, False, False])).tolist()
    [3, 2, 4]
    >>> _own(np.array([0, 1, 2]), np.array([9, 3, 5]), np.array([True, False, False])).tolist()
    [5, 2, 2]
    """
    own = np.zeros(len(starts), np.int64)
    computing, waiting = np.flatnonzero(~waits), np.flatnonzero(waits)
    begins, until, order = _pieces(starts[computing], ends[computing])
    own[computing[order]] = until - begins
    knots, covered = np.stack([begins, until], 1).ravel(), np.cumsum(until - begins)
    covered = np.stack([np.concatenate([[0], covered[:-1]]), covered], 1).ravel() if len(covered) else covered
    begins, until, order = _pieces(starts[waiting], ends[waiting])
    taken = np.interp(until, knots, covered) - np.interp(begins, knots, covered) if len(knots) else 0
    own[waiting[order]] = until - begins - np.asarray(taken, np.int64)
    return own


def _pieces(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(begins, ends, order), int64 [n]: disjoint pieces in the order of starts, each what its interval has after all before it."""
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(np.concatenate([[0], ends[order]]))[:-1] if len(order) else starts
    begins = np.maximum(starts[order], reach)
    return begins, np.maximum(ends[order], begins), order
