"""Seal: what shows that a message comes from another model of this server, since whoever can reach the server can also reach its stages.

    [ 32 bytes of seal ][ message ]

Nothing is kept, agreed on or set up: every model reads the seal of its server's process, and nobody beyond this host can.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

from trireme.core.refusal import Refusal

_SIZE = hashlib.sha256().digest_size  # bytes


def read_seal() -> bytes:
    """Of the server that started this process, for as long as it lives: where the kernel put it in memory, at random and for its own
    user's eyes, and the number of this boot. Refusal where neither can be read."""
    paths, found = (f"/proc/{os.getppid()}/auxv", "/proc/sys/kernel/random/boot_id"), b""
    for path in paths:
        with contextlib.suppress(OSError):  # a sandbox may hide one; alike from all models
            found += Path(path).read_bytes()
    if not found:
        raise Refusal("models of this server have no seal", why=f"of {' and '.join(paths)} neither can be read", fix="let them read one")
    return hashlib.sha256(found).digest()


def unseal(packed: bytes, seal: bytes) -> bytes:
    """The message behind the seal; Refusal for one from elsewhere."""
    if not hmac.compare_digest(packed[:_SIZE], seal):
        raise Refusal(
            "this message comes from outside the server",
            why="stages, eplb and the front take orders from one another alone",
            fix="ask the model llm",
        )
    return packed[_SIZE:]
