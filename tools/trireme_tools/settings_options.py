"""Settings as command-line options: one table, the same flags for every verb that serves, plans or computes. Runs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import typer

from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb, Settings, revise
from trireme.models.planner import SETTINGS


@dataclass(frozen=True)
class Flag:
    """How one setting is said on the command line: as it is spelt, and where it has a `name`, shorter."""

    help: str
    name: str | None = None
    read: Callable[[str], Any] | None = None  # text to value, where the setting is no plain number, switch or word


def _cut(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"layer cut {text!r} is not numbers", why="one for each stage", fix="write --layer-cut 16,14") from None


def _devices(text: str) -> list[list[int]]:
    try:
        return [[int(device) for device in stage.split(",")] for stage in text.split(";")]
    except ValueError:
        why = "a comma stands between devices, a semicolon between stages"
        raise Refusal(f"devices {text!r} are not numbers", why=why, fix='write --devices "0,1;2,3"') from None


def _word_or_rows(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _path(text: str) -> str:
    return str(Path(text).resolve())


def _word_or_path(text: str) -> str:
    return text if text == Eplb().initial_map else _path(text)


# every setting but `model`, which each verb takes in its own way; a dot leads into a group of settings
FLAGS = {
    "pipeline_parallel_size": Flag("pipeline stages", "--pp"),
    "tensor_parallel_size": Flag("ranks that share each layer of a stage", "--tp"),
    "context_parallel_size": Flag("groups of such ranks that share the rows of prompts: a stage has tp * cp ranks", "--cp"),
    "expert_parallel_size": Flag("parts that the experts of a layer are dealt into", "--ep"),
    "moe_data_parallel_size": Flag("copies of the experts in a stage: 1 or cp", "--moe-dp"),
    "sequence_parallel": Flag("rows between layers cut over tp: off, on, or from how many rows of a step on", "--sp", _word_or_rows),
    "strip_rows": Flag("with sp, a step of more rows passes in halves, sums of one beside products of the other; 0: never"),
    "experts": Flag("how rows and experts meet: gathered or dispatched"),
    "device": Flag("auto, cpu or cuda"),
    "devices": Flag('GPUs of the ranks of each stage, as "0,1;2,3"', read=_devices),
    "async_depth": Flag("steps in flight beyond pp (default: 2 on GPUs, 1 on CPUs)"),
    "link": Flag("how rows go from stage to stage: collective or tensor"),
    "layer_cut": Flag("layers of each stage, as 16,14 (default: by what stages compute for a token)", read=_cut),
    "dtype": Flag("auto, float32, bfloat16 or float16"),
    "load_format": Flag("auto, or dummy for random weights"),
    "tokenizer": Flag("another directory for tokenizer and chat template", read=_path),
    "max_model_len": Flag("tokens of prompt and output together (default: the checkpoint's)"),
    "max_num_seqs": Flag("sequences running at once"),
    "max_num_batched_tokens": Flag("rows of one step"),
    "max_micro_batch_size": Flag("decoding sequences of one step (default: ready decodes / pp)"),
    "dynamic_chunks": Flag("under pp, steps of long prompts shrink so that each takes equally long"),
    "max_queue_size": Flag("requests that may wait"),
    "enable_prefix_caching": Flag("reuse pages of equal prompt beginnings"),
    "kv_cache_memory_bytes": Flag("bytes of one rank's key/value pages"),
    "gpu_memory_utilization": Flag("the part of a GPU's memory that a rank may fill"),
    "enforce_eager": Flag("no CUDA graphs"),
    "num_pages": Flag("exact number of pages, in place of bytes"),
    "state_cache_memory_bytes": Flag("bytes of one rank's copies of states, for prefix reuse of hybrid models"),
    "mtp.num_tokens": Flag("drafts of a sequence at the most, where the checkpoint has a head for them: 0 is off", "--mtp"),
    "mtp.adaptive": Flag("fewer drafts, or none, where they bring less than they cost"),
    "mtp.max_batch_size": Flag("running sequences above which none are drafted"),
    "eplb.policy": Flag("experts move to where there is room for their load: auto, hierarchical, global, skew or minimal", "--eplb"),
    "eplb.num_redundant_experts": Flag("copies of busy experts in a layer"),
    "eplb.interval": Flag("steps between two looks at the balance"),
    "eplb.count_every": Flag("steps after which ranks report what they counted"),
    "eplb.layers_per_step": Flag("layers that change at one step"),
    "eplb.min_gain": Flag("the least part of the busiest rank's time that new maps must save"),
    "eplb.dispatch": Flag("among copies: auto, static or dynamic; for benchmarks fake (even loads) or skewed (Zipf 1.0)"),
    "eplb.initial_map": Flag("trivial, or a file of maps or loads", read=_word_or_path),
    "eplb.state": Flag("folder in which loads and maps are kept", read=_path),
    "threads_per_rank": Flag("CPU threads of a rank (default: cores / ranks)"),
    "default_max_tokens": Flag("for requests that name none"),
    "request_timeout_s": Flag("seconds after which a request that names no deadline is ended"),
    "step_timeout_s": Flag("seconds after which a step is a fault"),
    "start_timeout_s": Flag("seconds that ranks may take to load"),
    "step_trace": Flag("file for one JSON line a step and stage, for `trireme trace`", read=_path),
    "served_model_name": Flag("label `model` of the metrics"),
}


_SIZES = ("pp", "tp", "cp", "ep", "moe_dp")  # words of a plan that end in a number
# those that stand alone
_WORDS: dict[str, dict[str, Any]] = {
    "one": {},
    "sp": {"sequence_parallel": "on"},
    "dispatched": {"experts": "dispatched"},
    "tensor": {"link": "tensor"},
}
_DISPATCH = ("static", "dynamic", "fake", "skewed")  # behind eplb

# settings that list stages or ranks -> the sizes they must fit
_NAMED_BY_PLACE = {
    "layer_cut": {"pipeline_parallel_size"},
    "devices": {"pipeline_parallel_size", "tensor_parallel_size", "context_parallel_size"},
}


def settings_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `verb` an option for each setting; it gets those that the user set as `chosen: dict[str, Any]`, as a settings file
    has them."""
    return settings_options_of(*FLAGS)(verb)


def settings_options_of(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As settings_options, with some of the settings."""
    return lambda verb: _with_options(verb, {name: FLAGS[name] for name in names})


def _with_options(verb: Callable[..., Any], flags: dict[str, Flag]) -> Callable[..., Any]:
    extra = [_option(name, flag) for name, flag in flags.items()]
    own = inspect.signature(verb, eval_str=True)

    def command(**values: Any) -> Any:
        chosen: dict[str, Any] = {}
        for name, flag in flags.items():
            if (value := values.pop(_parameter(name))) is not None:
                group, _, field = name.rpartition(".")
                (chosen.setdefault(group, {}) if group else chosen)[field] = flag.read(value) if flag.read else value
        return verb(**values, chosen=chosen)

    keep = [parameter for name, parameter in own.parameters.items() if name != "chosen"]
    command.__signature__ = own.replace(parameters=[*keep, *extra])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keep, *extra]}
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    return command


def override(settings: Settings, chosen: dict[str, Any]) -> Settings:
    """The settings with what the user chose on the command line, checked again."""
    # those of a file name other stages or ranks
    outdated = dict.fromkeys(name for name, sizes in _NAMED_BY_PLACE.items() if sizes & set(chosen))
    groups = {name: getattr(settings, name) for name, value in chosen.items() if isinstance(value, dict)}
    whole = {name: (msgspec.structs.asdict(group) if group else {}) | chosen[name] for name, group in groups.items()}
    return revise(settings, outdated | chosen | whole)


def settings_of_words(plan: str) -> dict[str, Any]:
    """What a plan's words choose, as a Plan prints itself: "pp2 tp2 sp mtp3", "tp2 ep2 eplb4"; "one" is one rank. What they do not
    name is one or off."""
    chosen: dict[str, Any] = {SETTINGS[size]: 1 for size in _SIZES}
    chosen |= {"sequence_parallel": "off", "experts": "gathered", "mtp": {"num_tokens": 0}, "eplb": None}
    for word in plan.split():
        name = word.rstrip("0123456789")
        number = word.removeprefix(name)
        if word in _WORDS:
            chosen |= _WORDS[word]
        elif name == "mtp" and number:
            chosen["mtp"] = {"num_tokens": int(number)}
        elif name == "eplb":
            chosen["eplb"] = {"num_redundant_experts": int(number or 0)}
        elif word in _DISPATCH and chosen["eplb"] is not None:
            chosen["eplb"] = {**chosen["eplb"], "dispatch": word}
        elif name in _SIZES and number:
            chosen[SETTINGS[name]] = int(number)
        else:
            why = f"a plan is said in {', '.join(_WORDS)}, {', '.join(_SIZES)} or mtp with a number, and eplb with one or none"
            raise Refusal(f"{word!r} is no word of a plan", why=why, fix='write --plan "pp2 tp2 sp"')
    return chosen


def _parameter(name: str) -> str:
    return name.replace(".", "_")


def _struct(hint: Any) -> type:
    """Of a group of settings, which may be None where it is off."""
    return next(kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, msgspec.Struct))


def _option(name: str, flag: Flag) -> inspect.Parameter:
    spelling = f"--{_parameter(name).replace('_', '-')}"
    group, _, field = name.rpartition(".")
    hint = get_type_hints(_struct(get_type_hints(Settings)[group]) if group else Settings)[field]
    kinds = (bool, int, float) if flag.read is None else ()
    plain = next((kind for kind in kinds if kind is hint or kind in get_args(hint)), str)  # a str is checked by make_settings
    if plain is bool:
        spelling = f"{spelling}/--no-{spelling.removeprefix('--')}"
    spellings = [flag.name, spelling] if flag.name else [spelling]
    option = typer.Option(*spellings, help=flag.help, rich_help_panel="Settings", show_default=False)
    return inspect.Parameter(_parameter(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option])
