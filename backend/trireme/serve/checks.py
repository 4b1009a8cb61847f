"""Start-up checks: what would hang or fail later and obscurely is refused here, in one line. Reads /proc and /dev, starts nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trireme.core.devices import place_ranks, steps_in_flight
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan

_SHM = "/dev/shm"
_SHM_PER_MODEL = 8 << 20  # bytes: a stub's region starts at 1 MiB and grows with what is in flight


@dataclass(frozen=True)
class ServerFlags:
    """What matters to us of the server's command line; its defaults where it is silent."""

    explicit: bool = False  # models can be loaded again
    metrics: bool = True
    thread_pool: int = 32

    @classmethod
    def read(cls, words: Sequence[str]) -> ServerFlags:
        """Of an argument vector, in which a value stands behind `=` or in the next word."""
        flags, backend = {}, {}
        for word, after in zip(words, [*words[1:], ""], strict=False):
            name, equals, value = word.partition("=")
            if name == "--backend-config":
                owner, _, option = (value if equals else after).partition(",")
                key, _, setting = option.partition("=")
                if owner == "python":  # python-based backends take these too
                    backend[key] = setting
            else:
                flags[name] = value if equals else after
        return cls(
            explicit=flags.get("--model-control-mode") == "explicit",
            metrics=flags.get("--allow-metrics", "true").lower() in ("true", "1"),
            thread_pool=int(backend.get("thread-pool-size", cls.thread_pool)),
        )


def server_flags() -> ServerFlags:
    """Of the server that started this process; defaults where it cannot be read."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ServerFlags()
    return ServerFlags.read([word.decode(errors="replace") for word in words])


def open_calls(settings: Settings) -> int:
    """Threads of the server that healthy models can hold at once: a step in flight holds one at every stage, each stage one for what
    it pushes to `eplb`; the rest send answers."""
    return (steps_in_flight(settings) + (settings.eplb is not None)) * settings.num_stages + 8


def check_server(settings: Settings, flags: ServerFlags) -> None:
    """Refusal where the server was started with too little for these settings."""
    models = 1 + settings.num_stages + (settings.eplb is not None)
    threads = open_calls(settings)
    if flags.thread_pool < threads:
        raise Refusal(
            f"the server's thread-pool-size is {flags.thread_pool}, and {threads} calls can be open at once",
            why="steps in flight would keep the threads that send answers",
            fix=f"start tritonserver with --backend-config=python,thread-pool-size={threads}",
        )
    space, needed = os.statvfs(_SHM), models * _SHM_PER_MODEL
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise Refusal(
            f"{_SHM} has {free >> 20} MiB free, and {models} models need {needed >> 20}",
            why="the server and its models exchange tensors there",
            fix="start the container with --shm-size=1g, or remove what dead servers left there",
        )


def check_checkpoint(settings: Settings) -> None:
    """Refusal where the checkpoint is not there, of an unknown kind, too small for these settings, or cannot be spread as they ask; or
    where a tokenizer is named that is not there."""
    model = Path(settings.model)
    fix = "set `model` to a checkpoint's directory; nothing is downloaded (`trireme fetch-demo` makes the demo's)"
    if not (model / "config.json").exists():
        raise Refusal(f"no checkpoint in {model}", why="config.json is missing", fix=fix)
    spec = read_spec(model)
    Plan.of(settings, spec)
    if (settings.max_model_len or 0) > spec.max_position_embeddings:
        raise Refusal(
            f"max_model_len={settings.max_model_len} is more than the checkpoint's {spec.max_position_embeddings}",
            why="it knows no positions beyond",
            fix=f"use max_model_len={spec.max_position_embeddings}, or leave it out",
        )
    if settings.load_format != "dummy" and not any(model.glob("*.safetensors")):
        raise Refusal(f"no weights in {model}", why="there is no .safetensors file", fix=f"{fix}, or set load_format to dummy")
    if settings.tokenizer is not None and not Path(settings.tokenizer, "tokenizer.json").exists():
        raise Refusal(
            f"no tokenizer in {settings.tokenizer}",
            why="tokenizer.json is missing",
            fix="set `tokenizer` to the directory that has it, or leave it out",
        )


def check_devices(settings: Settings) -> None:
    """Refusal where settings need a GPU that this host does not have."""
    place_ranks(settings)


def check_instance(config: dict[str, Any]) -> None:
    """Refusal for instance groups that cannot be served. `config` is the model's, as `initialize` gets it."""
    name = config["name"]
    for group in config.get("instance_group", []):
        if group["kind"] == "KIND_GPU":
            raise Refusal(
                f"{name} asks for a GPU in its instance_group",
                why="its ranks are processes of their own, on the GPUs that `devices` in model.json names",
                fix="use KIND_CPU there, and set devices",
            )
        if group["count"] != 1:
            raise Refusal(
                f"{name} asks for {group['count']} instances",
                why="one scheduler decides, and a stage is one group of ranks",
                fix="use count: 1",
            )
    if len(config.get("instance_group", [])) > 1:
        raise Refusal(f"{name} has several instance groups", why="a model of ours is one instance", fix="leave one")
