"""What steps are made of: groups of kernels by name, whose time is whose where kernels overlap, and ranks that record windows of steps."""

from __future__ import annotations

import json
from multiprocessing import Pipe

import numpy as np
import pytest
from typer.testing import CliRunner

from layout.sources import launched, product
from tiny import tiny_checkpoint
from trireme.core.refusal import Refusal
from trireme_tools.cli import build
from trireme_tools.kernel_time import MIXTURE, OTHER, SUMS, Kernels, Spent, Window, group_of, look_at
from trireme_tools.profiler import Profile, Profiler
from trireme_tools.rebalance import mixture_times, without_profiled
from trireme_tools.timeline import Bar


def test_every_kernel_of_ours_has_a_group():
    names = [name for source in product() for name in launched(source.tree)]
    assert len(names) > 20
    assert not [name for name in names if group_of(name) == OTHER]


@pytest.mark.parametrize(
    ("name", "group"),
    [  # as profiles of H100s told them
        ("_linear_columns", "products"),
        ("nvjet_sm90_tst_192x128_64x5_1x2_h_bz_coopB_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false, f", "products"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u, 8u, 4u, __nv_bfloat16, __nv_bflo", "attention"),
        ("void flashinfer::PrefillWithKVCacheKernel<flashinfer::SparseCollectiveMainloop<PagedParams::Addition", "attention"),
        ("_gated_rms_norm_heads", "norms"),
        ("_gated_delta_carry", "delta rule and convolution"),
        ("_peer_sum_rows", "sums by peers, and their norms"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "sums and gathers"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send and receive"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MaxOps<float>, unsign", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long", OTHER),
    ],
)
def test_kernels_of_others(name: str, group: str):
    assert group_of(name) == group


def test_time_of_kernels_that_overlap():
    """Two steps from 10 to 30 and to 50 ms. A norm starts early and waits for the product before it; a receive of another stream
    waits beside both, and alone for 5 ms; what is outside is of other steps.

        product  |0 ----|------------ 22|             |30 ------ 40|
        norm                 |18 ------- 25|                 |38 ---- 45|
        receive              |18 ----------------- 30|
    """
    names = ["_linear_columns", "_rms_norm_rows", "ncclDevKernel_SendRecv(x)", "_silu_mul_blocks"]
    which, starts, ends = np.array([(0, 0, 22), (1, 18, 25), (2, 18, 30), (0, 30, 40), (1, 38, 45), (3, 50, 60)]).T
    window = look_at(Kernels(names, which, starts * 1_000_000, ends * 1_000_000), [10_000_000, 30_000_000, 50_000_000])
    assert (window.steps, window.step_ms, window.idle_ms) == (2, 20.0, 2.5)
    found = {spent.name: (spent.launches, spent.ms, spent.sum_ms) for spent in window.kernels}
    assert found == {
        "_linear_columns": (1.0, 11.0, 11.0),
        "_rms_norm_rows": (1.0, 4.0, 7.0),
        "ncclDevKernel_SendRecv(x)": (0.5, 2.5, 6.0),
    }
    assert [(group.name, group.ms) for group in window.groups] == [("products", 11.0), ("norms", 4.0), ("send and receive", 2.5)]


def test_nothing_ran():
    none = np.zeros(0, np.int64)
    assert look_at(Kernels([], none, none, none), [0, 1_000_000]) == (1, 1.0, 1.0, [])


@pytest.mark.ranks
def test_decode_and_prefill_of_two_stages(tmp_path):
    """Ranks of a CPU record torch's ops."""
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    for words in (["--decode=1,3", "--input-len=8", "--output-len=24"], ["--prefill=8,3x40"]):
        flags = ["--offline", "--profile", "--pp=2", "--threads-per-rank=1", "--kv-cache-memory-bytes=4000000"]
        words = ["bench", f"--model={model}", *flags, *words, f"--output={tmp_path / 'bench'}"]
        result = CliRunner(env={"COLUMNS": "160"}).invoke(build(), words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        profiles = json.loads((tmp_path / "bench.json").read_text())["profile"]
        kinds = ["decode of 1", "decode of 3"] if "--decode=1,3" in words else ["prefill of 1 x 8", "prefill of 3 x 40"]
        assert [(each["what"], each["stage"], each["rank"]) for each in profiles] == [
            (kind, stage, 0) for kind in kinds for stage in (0, 1)
        ]
        for each, other in zip(profiles[::2], profiles[1::2], strict=True):
            assert all(each[name] == other[name] for name in ("first", "last", "rows", "steps")), "of the same steps"
        for each in profiles:
            assert f"{each['what']}, stage {each['stage']} rank 0" in result.output
            assert sum(group["ms"] for group in each["groups"]) + each["idle_ms"] == pytest.approx(each["step_ms"])
            assert {"products", "norms", "attention", "activation"} <= {group["name"] for group in each["groups"]}
        if kinds[0] == "decode of 1":
            assert [each["rows"] for each in profiles[:2]] == [[1] * 6] * 2
        else:
            assert [sum(each["rows"]) for each in profiles] == [8, 8, 120, 120]


def test_a_profile_is_of_steps_that_are_alike(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    with pytest.raises(Refusal, match="nothing is profiled"):
        CliRunner().invoke(build(), ["bench", "--offline", "--profile", f"--model={model}"], catch_exceptions=False)


def test_a_rank_that_ended_is_refused_in_words():
    profiler = Profiler()
    profiler._ranks[0, 0], end = Pipe()
    end.close()
    with pytest.raises(Refusal, match="a rank ended while it was profiled"), profiler.recording({}):
        pass


def test_mixtures_of_two_ranks_early_and_late():
    """The busiest rank's time, and how long the others wait for it in the sum that follows."""
    profiles = []
    for name, times in {"early": (3.0, 1.0), "late": (2.2, 1.8)}.items():
        for rank, own in enumerate(times):
            spent = [Spent("_grouped_mlp_product", MIXTURE[0], 96.0, own, own), Spent("_route_rows", MIXTURE[1], 48.0, 0.5, 0.5)]
            spent.append(Spent("_peer_sum_rows", SUMS[0], 97.0, 3.5 - own, 3.5 - own))
            profiles.append(Profile(name, 0, rank, 40, 58, [8] * 16, Window(16, 4.0, 0.0, spent)))
    found = mixture_times(profiles)
    assert [found[f"mixture_ms_{name}"] for name in ("early", "late")] == [3.5, 2.7]
    assert [found[f"mixture_ms_{name}_mean"] for name in ("early", "late")] == [2.5, 2.5]
    assert [found[f"sums_ms_{name}_mean"] for name in ("early", "late")] == pytest.approx([1.5, 1.5])
    ops = Window(16, 4.0, 0.0, [Spent("aten::mm", "products", 96.0, 3.0, 3.0)])
    assert mixture_times([each._replace(window=ops) for each in profiles]) == {}, "a CPU's ops do not say whose they are"
    bars = [Bar(0, number, 0, 8, float(number), 0.0, 1.0) for number in range(100)]
    assert [bar.number for bar in without_profiled(bars, profiles) if not bar.rows] == list(range(39, 70))
