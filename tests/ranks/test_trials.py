"""Trials, on a CPU: kernels in the Triton language are not run, but asked what they would be compiled for. No step asks for anything that
a rank's trials and graphs did not meet as it was loaded: a kernel that depends on one size more fails here until a trial has it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch

import trireme_kernels
from any_steps import any_steps
from ranks.test_graphs import Records, packed
from threads import Boards, on_every_rank
from tiny import tiny_checkpoint
from trireme.core.settings import make_settings
from trireme.parallel.link import SoloLink
from trireme.ranks import chains, drafter, fed, graphs, runner, sampler, states
from trireme.ranks.load import load_runner
from trireme.ranks.runner import Runner
from trireme_kernels import choose, jit
from trireme_kernels.linear import tl as linear
from trireme_tools.settings_options import settings_of_words

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Product = tuple[int, tuple[int, ...], torch.dtype]  # rows, the weight's shape, the result's dtype

OPS = [module.name for module in pkgutil.iter_modules(trireme_kernels.__path__) if module.ispkg]


class Asked:
    """In place of a kernel: what each launch would be compiled for, and that it can be looked up. Nothing is computed."""

    def __init__(self, kernel: Any, name: str, keys: set[str]):
        made = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        self._name, self._keys = name, keys
        self._is_ours, self._params = isinstance(kernel, jit.Kernel), made.params
        self._bind = create_function_from_signature(made.signature, made.params, make_backend(GPUTarget("cuda", 90, 32)))

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: Any, **named: Any) -> None:
            if self._is_ours:
                jit._written(self._params, args)
            _, specialised, options = self._bind(*args, **named)
            self._keys.add(f"{self._name} {specialised} {sorted(options.items())}")

        return launch


@pytest.fixture
def keys(monkeypatch) -> set[str]:
    """Of all launches from now on. Implementations in the Triton language are chosen, for a GPU, and what they leave is zeros."""
    found: set[str] = set()
    # all of them first: one takes functions of another's, as they are
    modules = {op: importlib.import_module(f"trireme_kernels.{op}.tl") for op in OPS if "tl" in choose.implementations(op)}
    for op, module in modules.items():
        for name, value in list(vars(module).items()):
            if type(value).__name__ in ("JITFunction", "Kernel", "InterpretedFunction"):
                monkeypatch.setattr(module, name, Asked(value, f"{op}.{name}", found))

    def misfit(op, name, case, *, forced=False):
        if name == "reference":
            return None
        return choose._file(op, name).fits(case) if name == "tl" else "not here"

    monkeypatch.setattr(choose, "misfit", misfit)
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: torch.zeros(*shape, **more))
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: torch.zeros_like(x, **more))
    monkeypatch.setattr(Runner, "_compiles", True)
    for module in (chains, drafter, fed, graphs, runner, sampler, states):
        monkeypatch.setattr(module, "upload", packed)
    return found


@pytest.fixture
def products(monkeypatch, keys) -> set[Product]:
    """Those of torch from now on."""
    found: set[Product] = set()
    many = linear._many

    def watched(x, weight, bias, dtype):
        found.add((len(x), tuple(weight.shape), dtype))
        return many(x, weight, bias, dtype)

    monkeypatch.setattr(linear, "_many", watched)
    return found


def is_loaded(product: Product, loaded: set[Product]) -> bool:
    """Whether one of as many rows was computed or, of many, of a few more."""
    num_rows, *form = product
    more = 0 if num_rows <= 256 else max(7, num_rows // 128 + 1)
    return any(num_rows <= rows <= num_rows + more for rows, *other in loaded if other == form)


# One head: a row of what states are made of is 68 bytes, so that where an item's first row begins makes a difference.
AWKWARD = {"linear_num_key_heads": 1, "linear_num_value_heads": 1}


@pytest.mark.parametrize(
    ("family", "sizes", "plan", "values"),
    [
        ("qwen3", {}, "one", {}),
        ("qwen3", {}, "tp2 sp", {}),
        ("qwen3_moe", {}, "one", {"enforce_eager": True}),
        ("qwen3_5_moe", {}, "mtp2", {}),
        ("qwen3_5_moe", {}, "mtp2", {"dtype": "float32", "enforce_eager": True}),
        ("qwen3_5_moe", AWKWARD, "mtp1", {"max_num_seqs": 3, "max_num_batched_tokens": 40}),
        ("qwen3_5_moe", {}, "tp2 ep2 eplb2 mtp2", {}),
        ("qwen3_5_moe", {}, "tp2 cp2 ep2 dispatched sp mtp2", {"max_num_batched_tokens": 128}),
    ],
)
def test_trials_meet_all_that_steps_ask_for(tmp_path, monkeypatch, keys, products, family, sizes, plan, values):
    model = tiny_checkpoint(tmp_path, family, **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, **sizes})
    chosen = {"dtype": "bfloat16", "max_num_seqs": 150, "max_num_batched_tokens": 512, "max_model_len": 256, "threads_per_rank": 1}
    settings = make_settings({"model": str(model), "device": "cpu", "num_pages": 150 * 16, **chosen, **settings_of_words(plan), **values})
    if settings.experts == "dispatched":
        monkeypatch.setattr("trireme_kernels.sort_by_slot.tl.fits", lambda case: "the host reads what it counts")
    elif not settings.enforce_eager:
        monkeypatch.setattr(runner, "why_none", lambda *args: None)
        monkeypatch.setattr(Runner, "_recorder", lambda *args: Records())
    size, boards = settings.ranks_per_stage, Boards()
    ranks = on_every_rank(size, lambda rank: load_runner(settings, 0, rank, lambda sentence: None))

    def begin(rank: int) -> None:
        ranks[rank].collectives.begin(boards.groups(ranks[rank].collectives))
        ranks[rank].begin(SoloLink())

    on_every_rank(size, begin, boards)
    met, loaded = set(keys), set(products)
    assert met
    for step in any_steps(settings, 120, num_drafts=settings.mtp.num_tokens, vocab_size=251):
        on_every_rank(size, lambda rank: ranks[rank].run(step, None, 0.0).finish(), boards)  # noqa: B023
        assert keys <= met, f"{step.num_items} items, {step.num_rows} rows: {sorted(keys - met)}"
        new = [product for product in products - loaded if not is_loaded(product, loaded)]
        assert not new, f"{step.num_items} items, {step.num_rows} rows, of which {step.num_samples} are sampled: {new}"
