"""Sampling parameters: what users may write, in vLLM's and TensorRT-LLM's spelling, made into a checked Sampling.
Text is encoded by the caller."""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trireme.core.refusal import Refusal
from trireme.core.request import Sampling

Encode = Callable[[str], Sequence[int]]  # text -> token ids, no special tokens added

_ALIASES = {  # TensorRT-LLM's and transformers' names -> vLLM's
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "request_output_len": "max_tokens",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "random_seed": "seed",
    "stop_words": "stop",
    "stop_words_list": "stop",
    "bad_words_list": "bad_words",
    "num_return_sequences": "n",
}
_NEUTRAL = {  # known elsewhere, here only with the values that change nothing
    "beam_width": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "beam_search_diversity_rate": (0,),
    "no_repeat_ngram_size": (0,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}


class _Range(NamedTuple):
    kind: type  # int or float
    least: float
    most: float
    above: bool = False  # whether `least` itself is out


_RANGES = {
    "max_tokens": _Range(int, 1, 2**31 - 1),
    "min_tokens": _Range(int, 0, 2**31 - 1),
    "temperature": _Range(float, 0, 100),
    "top_k": _Range(int, -1, 2**31 - 1),
    "top_p": _Range(float, 0, 1, above=True),
    "min_p": _Range(float, 0, 1),
    "repetition_penalty": _Range(float, 0, 100, above=True),
    "presence_penalty": _Range(float, -2, 2),
    "frequency_penalty": _Range(float, -2, 2),
    "seed": _Range(int, -1, 2**63 - 1),
    "n": _Range(int, 1, 128),
    "logprobs": _Range(int, 0, 20),
    "prompt_logprobs": _Range(int, 0, 20),
}
_OTHERS = ("stop", "stop_token_ids", "bad_words", "logit_bias", "ignore_eos", "end_id", "pad_id", "return_log_probs")
_GREEDY_BELOW = 1e-5  # temperatures, as in vLLM: logits divided by one near 0 are infinite, and which is the highest is lost


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request that says nothing gets, from the checkpoint and the operator."""

    eos_token_ids: tuple[int, ...] = ()
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, model_dir: Path, max_tokens: int = 256) -> Defaults:
        """Read generation_config.json and config.json, each where it is there.

        As vLLM does by default, sampling values of generation_config.json hold whatever its `do_sample` says, and
        what it does not name is neutral (temperature 1, no cuts). Ends of sequence are those of both files.
        """
        generation, config = _read(model_dir / "generation_config.json"), _read(model_dir / "config.json")
        text_config = config.get("text_config") or {}
        eos = dict.fromkeys(token for part in (generation, config, text_config) for token in _id_list(part.get("eos_token_id")))
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: _number(name, generation[name]) for name in names if generation.get(name) is not None}
        if "top_k" in given:
            given["top_k"] = max(0, given["top_k"])
        return cls(eos_token_ids=tuple(eos), max_tokens=max_tokens, **given)


def make_sampling(
    values: Mapping[str, Any],
    defaults: Defaults,
    *,
    encode: Encode | None = None,
    vocab_size: int,
    prompt_len: int,
    max_model_len: int,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(48),
) -> Sampling:
    """Sampling of plain values; None means not given, and numbers and booleans may be strings.

    A missing seed, or -1, is drawn here, so that a request keeps it over repairs; 0 is a seed like others. `encode` is
    needed for bad_words in text. Refusal for an unknown name (with the nearest known one), a wrong type or range.
    """
    given = _canonical(values)
    numbers = {name: _number(name, given[name]) for name in _RANGES if name in given}
    room = max_model_len - prompt_len
    if room < 1:
        raise Refusal(
            f"the prompt has {prompt_len} tokens, max_model_len is {max_model_len}",
            why="no room is left for an output token",
            fix="shorten the prompt, set truncate_prompt_tokens, or raise max_model_len",
        )
    min_tokens = numbers.get("min_tokens", 0)
    max_tokens = min(room, numbers.get("max_tokens", max(defaults.max_tokens, min_tokens)))
    if min_tokens > numbers.get("max_tokens", room):
        raise Refusal(
            f"min_tokens={min_tokens} exceeds the {min(room, numbers.get('max_tokens', room))} tokens that may come",
            why=f"max_tokens is {numbers.get('max_tokens', 'not given')} and the prompt leaves room for {room}",
            fix="lower min_tokens or raise max_tokens",
        )
    seed = numbers.get("seed", -1)
    temperature = numbers.get("temperature", defaults.temperature)
    top_k = numbers.get("top_k", defaults.top_k)
    logprobs = numbers.get("logprobs")
    if logprobs is None and _flag("return_log_probs", given.get("return_log_probs", False)):
        logprobs = 0
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=max(0, top_k) if top_k < vocab_size else 0,
        top_p=numbers.get("top_p", defaults.top_p),
        min_p=numbers.get("min_p", defaults.min_p),
        repetition_penalty=numbers.get("repetition_penalty", defaults.repetition_penalty),
        presence_penalty=numbers.get("presence_penalty", 0.0),
        frequency_penalty=numbers.get("frequency_penalty", 0.0),
        logit_bias=_logit_bias(given.get("logit_bias", {}), vocab_size),
        seed=draw_seed() if seed < 0 else seed,
        stop=_texts("stop", given.get("stop", ())),
        stop_token_ids=_stop_token_ids(given, defaults, vocab_size),
        bad_words=_bad_words(given.get("bad_words", ()), encode, vocab_size),
        n=numbers.get("n", 1),
        logprobs=logprobs,
        prompt_logprobs=numbers.get("prompt_logprobs"),
    )


def names() -> list[str]:
    """Every name that make_sampling takes."""
    return [*_RANGES, *_OTHERS, *_ALIASES, *_NEUTRAL]


# ---- names


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by vLLM's names, without those that are None or neutral."""
    given: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for spelling, raw in values.items():
        value = _plain(raw)
        if value is None:
            continue
        name = _ALIASES.get(spelling, spelling)
        if name in _NEUTRAL:
            _check_neutral(name, value)
            continue
        if name not in _RANGES and name not in _OTHERS:
            near = difflib.get_close_matches(spelling, names(), n=1)
            raise Refusal(
                f"unknown sampling parameter {spelling!r}",
                why="a misspelt parameter must not be ignored",
                fix=f"did you mean {near[0]!r}?" if near else "see README, Asking",
            )
        if name in spelt and given[name] != value:
            raise Refusal(f"{spelt[name]} and {spelling} disagree", why="they are two names of one parameter", fix="send one of them")
        given[name], spelt[name] = value, spelling
    return given


def _check_neutral(name: str, value: Any) -> None:
    neutral = _NEUTRAL[name][0]
    same = _flag(name, value) == neutral if isinstance(neutral, bool) else _as_number(name, value, float) == neutral
    if not same:
        raise Refusal(f"{name}={value!r} is not supported", why="beam search and the like are not there", fix=f"use {name}={neutral}")


# ---- values


def _plain(value: Any) -> Any:
    """Python values of numpy scalars and bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _as_number(name: str, value: Any, kind: type) -> int | float:
    """int or float of a number or its text; Refusal otherwise."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        if isinstance(value, int):
            return kind(value)
        if kind is int and isinstance(value, str) and value.strip().lstrip("+-").isdigit():
            return int(value)
        number = float(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        raise Refusal(f"{name}={value!r} is not {wanted}", why=f"{name} is {wanted}", fix=f"send {name} as {wanted}") from None


def _number(name: str, value: Any) -> Any:
    kind, least, most, above = _RANGES[name]
    number = _as_number(name, value, kind)
    if number < least or number > most or (above and number == least):
        span = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise Refusal(f"{name}={number} is out of range", why=f"it must be {span}", fix=f"send a value {span}")
    return number


def _flag(name: str, value: Any) -> bool:
    truth = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if truth is None:
        raise Refusal(f"{name}={value!r} is not a boolean", why=f"{name} is true or false", fix="send true or false")
    return truth


def _listed(value: Any, *kinds: type) -> list[Any]:
    """A list of a list, of one value, or of a JSON list of `kinds` in text (the server's request parameters hold no lists)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except ValueError:
            return [value]  # a word that begins with a bracket
        return items if all(isinstance(item, kinds) for item in items) else [value]
    return [_plain(item) for item in value] if isinstance(value, list | tuple | set) else [value]


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Strings; empty ones, which TensorRT-LLM's clients send for none, are left out."""
    items = _listed(value, str)
    if wrong := [item for item in items if not isinstance(item, str)]:
        raise Refusal(f"{name} holds {wrong[0]!r}", why=f"{name} is a string or a list of strings", fix=f"send {name} as strings")
    return tuple(item for item in items if item)


def _token_id(name: str, value: Any, vocab_size: int) -> int:
    token = _as_number(name, value, int)
    if not 0 <= token < vocab_size:
        raise Refusal(f"{name} names token {token}", why=f"token ids go from 0 to {vocab_size - 1}", fix=f"mend {name}")
    return int(token)


def _stop_token_ids(given: Mapping[str, Any], defaults: Defaults, vocab_size: int) -> tuple[int, ...]:
    """The request's own, and the ends of sequence: `end_id` in place of the checkpoint's, none with ignore_eos."""
    own = [_token_id("stop_token_ids", token, vocab_size) for token in _listed(given.get("stop_token_ids", ()), int)]
    eos = defaults.eos_token_ids
    if "end_id" in given and _as_number("end_id", given["end_id"], int) != -1:  # -1: TensorRT-LLM's for none
        eos = (_token_id("end_id", given["end_id"], vocab_size),)
    elif "end_id" in given:
        eos = ()
    if _flag("ignore_eos", given.get("ignore_eos", False)):
        eos = ()
    return tuple(dict.fromkeys([*own, *eos]))


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping):
        raise Refusal("logit_bias is not a map", why="it gives token ids their bias", fix='send {"123": -5.0}')
    bias = {_token_id("logit_bias", token, vocab_size): float(_as_number("logit_bias", add, float)) for token, add in value.items()}
    return {token: max(-100.0, min(100.0, add)) for token, add in bias.items()}  # clamped, as vLLM does


def _bad_words(value: Any, encode: Encode | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words, or of lists of token ids. A word counts as the start of a text and, where that is as
    many tokens with another first one, also after a space (vLLM's rule)."""
    words: list[tuple[int, ...]] = []
    for item in _listed(value, str, list):
        if isinstance(item, list | tuple):
            words.append(tuple(_token_id("bad_words", token, vocab_size) for token in item))
            continue
        (text,) = _texts("bad_words", item if isinstance(item, list) else [item]) or ("",)
        if not text.strip():
            continue
        if encode is None:
            raise Refusal("bad_words in text need a tokenizer", why="none is loaded", fix="send lists of token ids")
        start, inside = tuple(encode(text.lstrip())), tuple(encode(" " + text.lstrip()))
        words.append(start)
        if inside and len(inside) == len(start) and inside[0] != start[0]:
            words.append(inside)
    return tuple(dict.fromkeys(word for word in words if word))


# ---- files


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Refusal(f"{path} is not JSON", why=str(error), fix="fetch the checkpoint again") from None


def _id_list(value: Any) -> list[int]:
    """Token ids of an id, a list of them or null."""
    if value is None:
        return []
    return [int(token) for token in (value if isinstance(value, list) else [value])]
