"""Choices: the first implementation that fits, made once, explained in a table; a missing package is a reason, not a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trireme_kernels import choose
from trireme_kernels.case import Case
from trireme_kernels.choose import Choices, misfit


def test_cpu_gets_the_reference_and_the_table_says_why():
    choices = Choices("cpu", torch.float32)
    norm = choices("rms_norm", hidden=8)
    assert norm is choices("rms_norm", hidden=8)
    choices("penalise")
    assert choices.table().splitlines() == [
        "rms_norm  hidden=8  reference  not tl: runs on cuda, not on cpu",
        "penalise            reference  not tl: runs on cuda, not on cpu",
    ]


def test_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert misfit("rms_norm", "tl", Case("cuda", torch.float32)) == "the package triton is not installed"
    assert misfit("rms_norm", "reference", Case("cuda", torch.float32)) is None


def test_force():
    with pytest.raises(ValueError, match="no implementation 'fast'; it has tl, reference"):
        Choices("cpu", torch.float32, {"rms_norm": "fast"})("rms_norm")


def test_forced_kernel_needs_the_interpreter_on_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="no implementation of silu_mul fits cpu float32: tl: runs on cuda, not on cpu"):
        Choices("cpu", torch.float32, {"silu_mul": "tl"})("silu_mul")


def test_unfit_sizes_are_a_reason():
    pytest.importorskip("triton")
    case = Case("cuda", torch.float32, {"num_heads": 8, "num_kv_heads": 8, "head_dim": 512})
    assert misfit("paged_attention", "tl", case) == "head_dim=512 is over 256"


def test_cpu_choices_do_not_import_the_language():
    """Importing triton costs a rank half a second of its start."""
    code = (
        "import sys, torch; from trireme_kernels.choose import Choices; choices = Choices('cpu', torch.float32); "
        "choices('rms_norm'); choices('paged_attention', num_heads=2, num_kv_heads=1, head_dim=8); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
