"""One log format for every process: `[trireme stage_0 rank 0] what happened`. Inside the server, stderr is its log."""

from __future__ import annotations

import logging
import os
import sys


def logger(name: str) -> logging.Logger:
    """The logger of one role (`front`, `stage_0`, `stage_0 rank 0`, `serve`); level from $TRIREME_LOG (default INFO)."""
    log = logging.getLogger(f"trireme.{name}")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s [trireme {name}] %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(os.environ.get("TRIREME_LOG", "INFO").upper())
    return log
