"""Settings as command-line options: one table, the same flags for `serve`, `repo`, `generate` and `trace`. Runs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, make_settings


@dataclass(frozen=True)
class Flag:
    """How one setting is spelt on the command line; None: as the setting itself."""

    help: str
    name: str | None = None


# every setting but `model`, which each verb takes in its own way
FLAGS = {
    "pipeline_parallel_size": Flag("pipeline stages", "--pp"),
    "tensor_parallel_size": Flag("ranks that share each layer of a stage", "--tp"),
    "async_depth": Flag("steps in flight beyond pp"),
    "link": Flag("how rows go from stage to stage: collective or tensor"),
    "layer_cut": Flag("layers of each stage, as 16,14 (default: by a cost model)"),
    "dtype": Flag("auto, float32, bfloat16 or float16"),
    "load_format": Flag("auto, or dummy for random weights"),
    "tokenizer": Flag("another directory for tokenizer and chat template"),
    "max_model_len": Flag("tokens of prompt and output together (default: the checkpoint's)"),
    "max_num_seqs": Flag("sequences running at once"),
    "max_num_batched_tokens": Flag("rows of one step"),
    "max_micro_batch_size": Flag("decoding sequences of one step (default: ready decodes / pp)"),
    "max_queue_size": Flag("requests that may wait"),
    "enable_prefix_caching": Flag("reuse pages of equal prompt beginnings"),
    "kv_cache_memory_bytes": Flag("bytes of one rank's key/value pages"),
    "num_pages": Flag("exact number of pages, in place of bytes"),
    "threads_per_rank": Flag("CPU threads of a rank (default: cores / ranks)"),
    "default_max_tokens": Flag("for requests that name none"),
    "request_timeout_s": Flag("seconds after which a request that names no deadline is ended"),
    "step_timeout_s": Flag("seconds after which a step is a fault"),
    "start_timeout_s": Flag("seconds that ranks may take to load"),
    "step_trace": Flag("file for one JSON line a step and stage, for `trireme trace`"),
    "served_model_name": Flag("label `model` of the metrics"),
}


def settings_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `verb` an option for each setting; it gets those that the user set as `chosen: dict[str, Any]`."""
    hints = get_type_hints(Settings)
    extra = [_option(name, flag, hints[name]) for name, flag in FLAGS.items()]
    own = inspect.signature(verb, eval_str=True)

    def command(**values: Any) -> Any:
        given = {name: values.pop(name) for name in FLAGS}
        chosen = {name: value for name, value in given.items() if value is not None}
        if "layer_cut" in chosen:
            chosen["layer_cut"] = _cut(chosen["layer_cut"])
        for name in {"tokenizer", "step_trace"} & set(chosen):
            chosen[name] = str(Path(chosen[name]).resolve())
        return verb(**values, chosen=chosen)

    keep = [parameter for name, parameter in own.parameters.items() if name != "chosen"]
    command.__signature__ = own.replace(parameters=[*keep, *extra])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keep, *extra]}
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    return command


def override(settings: Settings, chosen: dict[str, Any]) -> Settings:
    """The settings with what the user chose on the command line, checked again."""
    values = {name: getattr(settings, name) for name in Settings.__struct_fields__}
    if "pipeline_parallel_size" in chosen and "layer_cut" not in chosen:
        values["layer_cut"] = None  # that of a file names other stages
    return make_settings(values | chosen)


def _option(name: str, flag: Flag, hint: Any) -> inspect.Parameter:
    spelling = flag.name or f"--{name.replace('_', '-')}"
    plain = next((kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)), str)  # a str is checked by make_settings
    if plain is bool:
        spelling = f"{spelling}/--no-{spelling.removeprefix('--')}"
    option = typer.Option(spelling, help=flag.help, rich_help_panel="Settings", show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option])


def _cut(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"layer cut {text!r} is not numbers", why="one for each stage", fix="write --layer-cut 16,14") from None
