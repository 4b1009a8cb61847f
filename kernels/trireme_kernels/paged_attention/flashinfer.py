"""paged_attention by FlashInfer: its decode kernel for items of one query, FlashAttention 3 on Hopper (else 2) for prompts.

A step is decodes first, then prompts: two launches a layer, since the prefill kernels do not split an item's keys over
programs and would read a long decode on one. FlashInfer compiles its kernels when first used, FlashAttention 3 in 90 s on 16
cores, into $FLASHINFER_WORKSPACE_BASE/.cache/flashinfer (default: home): `build` waits for that, no request.

A plan takes 0.35 ms of the CPU and 6 us for each decode (FlashInfer looks for the longest one by one). It is not waited for.
"""

# pyright: reportMissingImports=false, reportCallIssue=false

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.paged_attention.op import PAGE, CapturedDecode, PagedAttention
from trireme_kernels.upload import upload

_WORKSPACE_BYTES = 256 << 20  # partial results of items whose keys are split; what FlashInfer's own examples take is half
_INT_WORKSPACE_BYTES = 8 << 20  # FlashInfer's default
_HEAD_DIMS = (64, 128, 256)
_PLAIN_GROUPS = (1, 2, 3, 4, 8)  # query heads of one kv head that the plain decode kernel is made for
_TENSOR_CORES_FROM = 4  # of such heads, decode by matrix instructions is faster: by 5 % with 4, by 45 % with 8 (H100)


def fits(case: Case) -> str | None:
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 and float16, not in {str(case.dtype).removeprefix('torch.')}"
    if case.sizes["head_dim"] not in _HEAD_DIMS:
        return f"head_dim={case.sizes['head_dim']} is none of {', '.join(map(str, _HEAD_DIMS))}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    return None


def build(case: Case) -> PagedAttention:
    return FlashInfer(case)


class _Paged(NamedTuple):
    """Items' pages as FlashInfer takes them: flat, with bounds."""

    bounds: Tensor  # int32 [B + 1], on the host
    pages: Tensor  # int32 [bounds[-1]], on the device
    last_page_len: Tensor  # int32 [B], on the host


class _Idle(NamedTuple):
    wrapper: Any
    copied: torch.cuda.Event  # reached when the device has read the wrapper's page-locked memory


class _Wrappers:
    """FlashInfer's wrappers, each for one plan at a time.

    A wrapper's `plan` writes page-locked memory of its own and orders a copy to the device. Planned again too early it would
    change what an earlier step is about to copy, or has planned and not yet launched. So a wrapper comes back when its plan
    is dropped, and is planned anew only once its copy is made; if none is ready there is one more. There are soon as many
    as there are steps in flight.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self._idle = make, deque[_Idle]()

    def take(self) -> Any:
        return self._idle.popleft().wrapper if self._idle and self._idle[0].copied.query() else self._make()

    def give(self, wrapper: Any, copied: torch.cuda.Event) -> None:
        self._idle.append(_Idle(wrapper, copied))


class _Plan:
    """Row ranges of q, and the wrapper that attends to each."""

    def __init__(self):
        self.parts: list[tuple[slice, Any]] = []

    def add(self, rows: slice, wrapper: Any, wrappers: _Wrappers) -> None:
        self.parts.append((rows, wrapper))
        weakref.finalize(self, wrappers.give, wrapper, _now())


class FlashInfer:
    def __init__(self, case: Case):
        sizes = case.sizes
        self.num_heads, self.num_kv_heads, self.head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
        self.dtype, self.device = case.dtype, torch.device(case.device, torch.cuda.current_device())
        self.window_left = sizes.get("window", 0) - 1  # keys before a query's own; -1: all
        group, rest = divmod(self.num_heads, self.num_kv_heads)
        assert rest == 0, "query heads are shared out evenly"
        self.tensor_cores = group >= _TENSOR_CORES_FROM or group not in _PLAIN_GROUPS
        # Shared by all plans: what a run writes here it has read again before the stream reaches the next one.
        self.workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._decodes, self._prefills = _Wrappers(self._decode_wrapper), _Wrappers(self._prefill_wrapper)
        self._compile()

    def plan(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> _Plan:
        query_lens, kv_lens, page_table = np.asarray(query_lens), np.asarray(kv_lens), np.asarray(page_table)
        if not query_lens.all():
            real = query_lens > 0
            query_lens, kv_lens, page_table = query_lens[real], kv_lens[real], page_table[real]
        num_items, plan = len(query_lens), _Plan()
        num_decodes = int(np.argmax(query_lens != 1)) if (query_lens != 1).any() else num_items
        if num_decodes:
            wrapper = self._decodes.take()
            self.plan_decodes(wrapper, self.paged(kv_lens[:num_decodes], page_table[:num_decodes]))
            plan.add(slice(0, num_decodes), wrapper, self._decodes)
        if num_decodes < num_items:
            bounds, wrapper = np.append(0, np.cumsum(query_lens[num_decodes:])), self._prefills.take()
            self._plan_prefills(wrapper, bounds, self.paged(kv_lens[num_decodes:], page_table[num_decodes:]))
            plan.add(slice(num_decodes, num_decodes + int(bounds[-1])), wrapper, self._prefills)
        return plan

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: _Plan, out: Tensor | None = None) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        for rows, wrapper in plan.parts:
            wrapper.run(q[rows], (k_pool, v_pool), out=out[rows])
        return out

    def captured(self, batch_size: int, max_pages: int) -> CapturedDecode:
        return _Captured(self, batch_size, max_pages)

    def paged(self, kv_lens: np.ndarray, page_table: np.ndarray) -> _Paged:
        num_pages = -(-kv_lens // PAGE)
        bounds = np.zeros(len(kv_lens) + 1, np.int32)
        np.cumsum(num_pages, out=bounds[1:])
        held = page_table[np.arange(page_table.shape[1]) < num_pages[:, None]]
        last_page_len = ((kv_lens - 1) % PAGE + 1).astype(np.int32)
        return _Paged(torch.from_numpy(bounds), upload(held.astype(np.int32), self.device), torch.from_numpy(last_page_len))

    def plan_decodes(self, wrapper: Any, paged: _Paged) -> None:
        wrapper.plan(
            *paged,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            PAGE,
            window_left=self.window_left,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )

    def _plan_prefills(self, wrapper: Any, bounds: np.ndarray, paged: _Paged) -> None:
        wrapper.plan(
            torch.from_numpy(bounds.astype(np.int32)),
            *paged,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            PAGE,
            causal=True,
            window_left=self.window_left,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )

    def _decode_wrapper(self) -> Any:
        return BatchDecodeWithPagedKVCacheWrapper(self.workspace, "HND", use_tensor_cores=self.tensor_cores)

    def _prefill_wrapper(self) -> Any:
        return BatchPrefillWithPagedKVCacheWrapper(self.workspace, "HND", backend="auto")

    def _compile(self) -> None:
        """Both kernels at once: a plan of each loads them, and compiles what no process of this machine has compiled yet."""

        def load(num_queries: int) -> None:
            with torch.cuda.device(self.device):
                length = np.array([num_queries], np.int32)
                self.plan(length, length, np.zeros((1, 1), np.int32))

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(load, (1, 2)))


class _Captured:
    """A graph reads one set of buffers. Its wrappers are many plans' page-locked memory in front of that one set."""

    def __init__(self, op: FlashInfer, batch_size: int, max_pages: int):
        self._op, self._batch_size = op, batch_size
        bounds, pages, last_page_len = (
            torch.zeros(size, dtype=torch.int32, device=op.device) for size in (batch_size + 1, batch_size * max_pages, batch_size)
        )
        self._buffers = {"paged_kv_indptr_buffer": bounds, "paged_kv_indices_buffer": pages, "paged_kv_last_page_len_buffer": last_page_len}
        self._int_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=op.device)
        self._wrappers = _Wrappers(self._wrapper)
        self._planned: Any = None

    def plan(self, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> None:
        num_items, width = page_table.shape
        lens, table = np.ones(self._batch_size, np.int32), np.zeros((self._batch_size, max(1, width)), np.int32)
        lens[:num_items], table[:num_items, :width] = kv_lens, page_table
        self._planned = self._wrappers.take()
        self._op.plan_decodes(self._planned, self._op.paged(lens, table))
        self._wrappers.give(self._planned, _now())

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        return self._planned.run(q, (k_pool, v_pool))

    def _wrapper(self) -> Any:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._op.workspace, "HND", use_cuda_graph=True, use_tensor_cores=self._op.tensor_cores, **self._buffers
        )
        wrapper.reset_workspace_buffer(self._op.workspace, self._int_workspace)
        return wrapper


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
