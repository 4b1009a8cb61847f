"""Settings: the one file a user edits (`model_repository/llm/1/model.json`), checked; and Limits, the operator's numbers in it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from trireme.core.refusal import Refusal
from trireme.core.step import PAGE


class Mtp(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Speculative decoding by the checkpoint's own head (multi-token prediction)."""

    num_tokens: int | None = None  # drafts of a sequence at the most; None: 3 where the checkpoint has a head; 0: off
    adaptive: bool = True  # fewer drafts where few are accepted
    max_batch_size: int = 32  # running sequences above which none are drafted, since they cost more than they bring

    def num_drafts(self, num_layers: int) -> int:
        """Drafts of a sequence at the most, by a head of so many layers: 0 where the checkpoint has none. Refusal where drafts were
        asked for all the same."""
        if self.num_tokens and not num_layers:
            raise Refusal(
                f"mtp asks for {self.num_tokens} drafts, and the checkpoint has no head to make them",
                why="its config.json names no mtp layers, or its files hold none",
                fix="leave mtp out, or use a checkpoint that was saved with its head",
            )
        return (3 if self.num_tokens is None else self.num_tokens) if num_layers else 0


class Eplb(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Balancing of experts over the ranks of a stage (EPLB): copies of busy ones, and which rank has which."""

    num_redundant_experts: int = 0  # slots of a layer beyond its experts; ep divides the sum
    interval: int = 1000  # steps between two looks at the balance
    count_every: int = 10  # steps after which ranks report what they counted
    layers_per_step: int = 4  # that are prepared together, and change at one step
    min_gain: float = 0.05  # the least part of the busiest rank's time that new maps must save; 0 or less: a drill, they move at every look
    policy: Literal["auto", "hierarchical", "global", "skew", "minimal"] = "auto"
    dispatch: Literal["auto", "static", "dynamic", "fake", "skewed"] = "auto"  # among copies; the last two: routers for benchmarks
    initial_map: str = "trivial"  # or a file of maps or loads that `eplb` saved
    state: str | None = None  # folder in which loads and maps are saved, and from which they are loaded at start


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """vLLM's spelling where the meaning is the same. Paths are absolute once read by `read_settings`."""

    model: str  # checkpoint directory: config.json, *.safetensors, tokenizer.json, generation_config.json
    tokenizer: str | None = None  # another directory for the tokenizer and chat template
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on CPU, the checkpoint's on GPU
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: int | None = None  # tokens of prompt and output together; None: the checkpoint's
    max_num_seqs: int = 64  # sequences running at once
    max_num_batched_tokens: int = 512  # rows of one step
    max_micro_batch_size: int | None = None  # decoding sequences of one step; None: ready decodes / pp
    dynamic_chunks: bool = True  # under pp, steps of long prompts shrink so that each takes equally long; measured while serving
    max_queue_size: int = 1024  # requests waiting; one more is refused as unavailable
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | None = None  # of one rank's pages; None: what is free on a GPU, 1 GiB on a CPU
    gpu_memory_utilization: float = 0.9  # the part of a GPU's memory that a rank may fill
    enforce_eager: bool = False  # no CUDA graphs
    num_pages: int | None = None  # exact number of pages, in place of bytes
    state_cache_memory_bytes: int | None = None  # of one rank's snapshots of states (hybrid models); None: as many as slots
    mtp: Mtp = Mtp()
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1  # of attention and dense layers
    context_parallel_size: int = 1  # a stage has tp * cp ranks
    expert_parallel_size: int = 1  # ep and moe_dp divide the ranks of a stage; they never multiply them
    moe_data_parallel_size: int = 1  # copies of the experts in a stage
    sequence_parallel: Literal["off", "on"] | int = "off"  # a number: rows of a step from which it is on
    strip_rows: int = 8192  # with sp, of a step of more rows what ranks exchange of one half goes beside products of the other; 0: never
    experts: Literal["gathered", "dispatched"] = "gathered"  # how rows and experts meet
    eplb: Eplb | None = None  # None: each expert stays in the slot of its number
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where this host has a GPU for every rank
    devices: list[list[int]] | None = None  # GPUs of the ranks of each stage; None: the first ones there are
    layer_cut: list[int] | None = None  # layers of each stage; None: by what stages compute for a token
    async_depth: int | None = None  # steps in flight beyond pp; None: 2 on GPUs, 1 on CPUs
    link: Literal["collective", "tensor"] = "collective"  # how rows go from stage to stage
    threads_per_rank: int | None = None  # CPU threads; None: cores / ranks
    default_max_tokens: int = 256  # for requests that name none
    request_timeout_s: float | None = None  # a deadline for requests that name none
    step_timeout_s: float = 60.0  # a step, or a gap before one, that takes longer is a fault
    start_timeout_s: float = 600.0  # for ranks to load and answer
    step_trace: str | None = None  # file for one JSON line a step and stage; read by `trireme trace`
    served_model_name: str | None = None  # label `model` of metrics; None: the front's model name

    @property
    def num_stages(self) -> int:
        return self.pipeline_parallel_size

    @property
    def ranks_per_stage(self) -> int:
        return self.tensor_parallel_size * self.context_parallel_size

    @property
    def world(self) -> int:
        """Ranks of all stages."""
        return self.num_stages * self.ranks_per_stage

    @property
    def sp_from(self) -> int | None:
        """Rows of a step from which sequence parallelism is on, where GPUs measure nothing else; None: never, as where tp is 1 and
        nothing can be cut."""
        if self.sequence_parallel == "off" or self.tensor_parallel_size == 1:
            return None
        return self.tensor_parallel_size if self.sequence_parallel == "on" else self.sequence_parallel

    @property
    def meets(self) -> bool:
        """Whether ranks speak to one another, and so must meet when an epoch begins."""
        return self.ranks_per_stage > 1 or (self.num_stages > 1 and self.link == "collective")

    @property
    def fed_back(self) -> bool:
        """Whether sampled tokens return to stage 0 over the link, ahead of the front."""
        return self.link == "collective"

    def threads(self, num_ranks: int) -> int:
        return self.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // num_ranks)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler may do: Settings resolved against the checkpoint (max_model_len, num_drafts), the stages (num_pages,
    num_snapshots, sp_from) and where they compute (inflight)."""

    max_model_len: int
    num_pages: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_micro_batch_size: int | None = None
    dynamic_chunks: bool = False
    max_queue_size: int = 1024
    enable_prefix_caching: bool = True
    num_stages: int = 1
    inflight: int = 2
    fed_back: bool = True
    sp_from: int | None = None  # rows of a step from which sp is on
    cp: int = 1
    num_snapshots: int | None = None  # copies of a sequence's states that stages have room for; None: no layer keeps states
    num_drafts: int = 0  # of a sequence at the most; 0: no head drafts
    adaptive_drafts: bool = True
    max_drafting: int = 32  # running sequences above which none are drafted
    count_every: int | None = None  # steps after which ranks report the loads of their experts; None: they do not count

    @classmethod
    def of(
        cls,
        settings: Settings,
        *,
        inflight: int,
        max_model_len: int,
        num_pages: int,
        num_snapshots: int | None = None,
        num_drafts: int = 0,
        sp_from: int | None = None,
    ) -> Limits:
        """Raises Refusal where the pages cannot hold one sequence of max_model_len."""
        if num_pages * PAGE < max_model_len:
            raise Refusal(
                f"{num_pages} pages of {PAGE} tokens cannot hold one sequence of max_model_len={max_model_len}",
                why="a sequence must fit to ever finish",
                fix=f"set max_model_len to at most {num_pages * PAGE}, or raise kv_cache_memory_bytes",
            )
        return cls(
            max_model_len=max_model_len,
            num_pages=num_pages,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_micro_batch_size=settings.max_micro_batch_size,
            dynamic_chunks=settings.dynamic_chunks and settings.num_stages > 1,
            max_queue_size=settings.max_queue_size,
            enable_prefix_caching=settings.enable_prefix_caching,
            num_stages=settings.num_stages,
            inflight=inflight,
            fed_back=settings.fed_back,
            sp_from=settings.sp_from if sp_from is None else sp_from,
            cp=settings.context_parallel_size,
            num_snapshots=num_snapshots,
            num_drafts=num_drafts,
            adaptive_drafts=settings.mtp.adaptive,
            max_drafting=settings.mtp.max_batch_size,
            count_every=settings.eplb.count_every if settings.eplb is not None else None,
        )


_AT_LEAST = {
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": PAGE,
    "max_micro_batch_size": 1,
    "max_queue_size": 1,
    "kv_cache_memory_bytes": 1,
    "gpu_memory_utilization": 0.01,
    "num_pages": 1,
    "state_cache_memory_bytes": 0,
    "mtp.max_batch_size": 0,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_parallel_size": 1,
    "moe_data_parallel_size": 1,
    "strip_rows": 0,
    "async_depth": 0,
    "threads_per_rank": 1,
    "default_max_tokens": 1,
    "request_timeout_s": 0.001,
    "step_timeout_s": 0.1,
    "start_timeout_s": 0.1,
    "eplb.num_redundant_experts": 0,
    "eplb.interval": 1,
    "eplb.count_every": 1,
    "eplb.layers_per_step": 1,
}


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings of plain values; Refusal for an unknown key, a wrong type or a number out of range."""
    unknown = sorted(set(values) - set(Settings.__struct_fields__))
    if unknown:
        near = difflib.get_close_matches(unknown[0], Settings.__struct_fields__, n=1)
        raise Refusal(
            f"unknown setting {unknown[0]!r}",
            why="a misspelt setting must not be ignored",
            fix=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(Settings.__struct_fields__)}",
        )
    _check_sequence_parallel(values.get("sequence_parallel", "off"))
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise Refusal("bad setting", why=str(error), fix="see README, Settings") from None
    for name, least in _AT_LEAST.items():
        value = _setting(settings, name)
        if value is not None and value < least:
            raise Refusal(f"{name}={value} is too small", why=f"it must be at least {least}", fix=f"set {name}={least} or more")
    if not 0 <= (settings.mtp.num_tokens or 0) < PAGE:
        raise Refusal(
            f"mtp asks for {settings.mtp.num_tokens} drafts",
            why=f"a token and its drafts are at most a page of {PAGE}",
            fix="set mtp.num_tokens from 0 (off) to 4: more are hardly ever accepted",
        )
    if settings.gpu_memory_utilization > 1:
        raise Refusal(
            f"gpu_memory_utilization={settings.gpu_memory_utilization:g} is too much",
            why="a GPU has no more memory than all of it",
            fix="set a part of 1, such as 0.9",
        )
    if settings.layer_cut is not None and len(settings.layer_cut) != settings.num_stages:
        raise Refusal(
            f"layer_cut names {len(settings.layer_cut)} stages but pipeline_parallel_size is {settings.num_stages}",
            why="each stage needs its number of layers",
            fix="give one number for each stage, or leave layer_cut out",
        )
    if settings.devices is not None:
        _check_devices(settings.devices, settings)
    return settings


def revise(settings: Settings, values: dict[str, Any]) -> Settings:
    """The settings with other values, checked again; Refusal as by make_settings."""
    return make_settings(msgspec.structs.asdict(settings) | values)


def _check_sequence_parallel(value: object) -> None:
    if value not in ("off", "on") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise Refusal(
            f"sequence_parallel={value!r} is none of off, on and a number of rows",
            why="it says from how many rows of a step on the rows between layers are cut over tp",
            fix='set "off", "on", or a number of at least 1',
        )


def _setting(settings: Settings, name: str) -> Any:
    """By its name, as "eplb.interval" in a group; None where the group is."""
    value: Any = settings
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _check_devices(devices: list[list[int]], settings: Settings) -> None:
    """Refusal unless every rank of every stage has a device of its own."""
    num_stages, num_ranks = settings.num_stages, settings.ranks_per_stage
    if settings.device == "cpu":
        raise Refusal("devices names GPUs, and device is cpu", why="they contradict each other", fix="leave one of them out")
    fix = f"name {num_ranks} for each of {num_stages} stage(s), or leave devices out"
    if len(devices) != num_stages:
        why = "each stage needs devices of its own"
        raise Refusal(f"devices names {len(devices)} stages but pipeline_parallel_size is {num_stages}", why=why, fix=fix)
    for stage, named in enumerate(devices):
        if len(named) != num_ranks:
            why = "a stage has tensor_parallel_size * context_parallel_size ranks, and each needs a device"
            raise Refusal(f"devices names {len(named)} for the {num_ranks} ranks of stage {stage}", why=why, fix=fix)
    every = [device for named in devices for device in named]
    if min(every) < 0:
        raise Refusal(f"devices names {min(every)}", why="devices are numbered from 0", fix=fix)
    if len(set(every)) < len(every):
        twice = next(device for device in every if every.count(device) > 1)
        raise Refusal(f"devices names device {twice} twice", why="two ranks do not share a device", fix=fix)


def read_settings(path: Path) -> Settings:
    """Settings of a model.json. A stage's file is `{"settings": "../../llm/1/model.json"}` and is followed; relative
    paths inside a settings file are taken from the folder that holds the model repository."""
    path = path.resolve()
    try:
        values = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise Refusal(f"settings file {path} is missing", why="every model of the repository names it", fix="run `trireme repo`") from None
    except msgspec.DecodeError as error:
        raise Refusal(f"settings file {path} is not JSON", why=str(error), fix="mend the file") from None
    if not isinstance(values, dict):
        raise Refusal(f"settings file {path} is not a JSON object", why="settings have names", fix='write {"model": "..."}')
    if set(values) == {"settings"}:
        return read_settings(path.parent / values["settings"])
    home = path.parents[3]  # <home>/<repository>/<model>/<version>/model.json
    for name in ("model", "tokenizer", "step_trace"):
        if isinstance(values.get(name), str):
            values[name] = str((home / values[name]).resolve())
    if isinstance(eplb := values.get("eplb"), dict):
        for name in ("state", "initial_map"):
            if isinstance(eplb.get(name), str) and eplb[name] != "trivial":
                eplb[name] = str((home / eplb[name]).resolve())
    return make_settings(values)


def write_settings(settings: Settings) -> str:
    """The text of a model.json with everything that differs from the defaults."""
    return msgspec.json.format(msgspec.json.encode(settings), indent=2).decode() + "\n"
