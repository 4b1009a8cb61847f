"""The seal is the server's: the same in each of its models, another one's in any other server, and nobody's who only writes to it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trireme.core.refusal import Refusal
from trireme.serve import seal
from trireme.serve.seal import read_seal, unseal

PRINT = "from trireme.serve.seal import read_seal; print(read_seal().hex())"


def test_models_of_one_server_share_it_and_no_other_does(monkeypatch):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    children = [subprocess.run([sys.executable, "-c", PRINT], env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    assert len({child.stdout for child in children}) == 1 and len(bytes.fromhex(children[0].stdout)) == 32
    monkeypatch.setattr(seal.os, "getppid", os.getpid)
    assert read_seal().hex() == children[0].stdout.strip()  # this process is their server
    other = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(seal.os, "getppid", lambda: other.pid)
    try:
        assert read_seal().hex() != children[0].stdout.strip()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("packed", [b"", b"message", bytes(32) + b"message"])
def test_what_comes_from_elsewhere_is_refused(packed):
    with pytest.raises(Refusal, match="outside the server"):
        unseal(packed, read_seal())
    assert unseal(read_seal() + b"message", read_seal()) == b"message"


def test_no_seal_that_anybody_could_make(monkeypatch):
    """Where nothing of the server can be read."""

    def hidden(path):
        raise PermissionError(path)

    monkeypatch.setattr(seal.Path, "read_bytes", hidden)
    with pytest.raises(Refusal, match="no seal"):
        read_seal()
