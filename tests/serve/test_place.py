"""The run folder is the server's, and an orphan has none."""

from __future__ import annotations

import pytest

from trireme.core.refusal import Refusal
from trireme.serve import place


def test_one_folder_for_each_server(monkeypatch):
    monkeypatch.setattr(place.os, "getppid", lambda: 4711)
    assert place.run_dir().name == "4711"


def stub_of(server: int):
    """What /proc/self/cmdline says in a stub that `server` started."""
    words = [
        "triton_python_backend_stub",
        "model.py",
        "region",
        "1048576",
        "1048576",
        str(server),
        "backends/python",
        "336",
        "stage_0_0_0",
        "",
    ]
    return lambda path: "\0".join(words).encode()


def test_an_orphan_is_refused(monkeypatch):
    monkeypatch.setattr(place.os, "getppid", lambda: 1)
    monkeypatch.setattr(place.Path, "read_bytes", stub_of(4711))
    with pytest.raises(Refusal, match="server of this model is gone"):
        place.run_dir()


def test_a_server_may_be_process_1_of_its_container(monkeypatch):
    monkeypatch.setattr(place.os, "getppid", lambda: 1)
    monkeypatch.setattr(place.Path, "read_bytes", stub_of(1))
    assert place.run_dir().name == "1"
