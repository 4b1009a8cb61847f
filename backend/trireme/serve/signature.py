"""What users send and get: the one table of inputs and outputs, and the reading of a request. No tokens, no sending.

The names are those of the vLLM backend and of TensorRT-LLM, together; everything is optional, but a prompt is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trireme.core.refusal import Refusal


class Field(NamedTuple):
    """A tensor of the front: `dim` 1 holds one value, -1 a list."""

    name: str
    type: str  # of the server: STRING, BOOL, INT32, ...
    dim: int
    about: str

    def config(self, *, optional: bool = False) -> dict[str, Any]:
        """As auto-complete wants it."""
        entry: dict[str, Any] = {"name": self.name, "data_type": f"TYPE_{self.type}", "dims": [self.dim]}
        return entry | {"optional": True} if optional else entry


INPUTS = (
    Field("text_input", "STRING", 1, "prompt as text"),
    Field("messages", "STRING", 1, "prompt as a chat: JSON list of {role, content}"),
    Field("input_ids", "INT32", -1, "prompt as tokens; output_ids come back"),
    Field("stream", "BOOL", 1, "text as it appears; else one response"),
    Field("sampling_parameters", "STRING", 1, "JSON object of vLLM's sampling parameters"),
    Field(
        "exclude_input_in_output", "BOOL", 1, "leave the prompt out of text_output; by default it is in where text_input is not streamed"
    ),
    Field("echo", "BOOL", 1, "the opposite of exclude_input_in_output"),
    Field("add_special_tokens", "BOOL", 1, "put the tokenizer's prefix before text_input (default true)"),
    Field("add_generation_prompt", "BOOL", 1, "end a chat where the assistant begins (default true)"),
    Field("chat_template_kwargs", "STRING", 1, "JSON object for the chat template (tools, enable_thinking, ...)"),
    Field("truncate_prompt_tokens", "INT32", 1, "keep the last so many prompt tokens"),
    Field("priority", "INT32", 1, "lower goes first (default 0)"),
    Field("timeout_s", "FP32", 1, "seconds after which the request is given up"),
    Field("return_finish_reason", "BOOL", 1, "send finish_reason"),
    Field("return_cumulative_logprob", "BOOL", 1, "send cumulative_logprob"),
    Field("return_logprobs", "BOOL", 1, "send logprobs"),
    Field("return_num_input_tokens", "BOOL", 1, "send num_input_tokens"),
    Field("return_num_output_tokens", "BOOL", 1, "send num_output_tokens"),
    Field("return_output_ids", "BOOL", 1, "send output_ids"),
    Field("return_log_probs", "BOOL", 1, "TensorRT-LLM: output_log_probs and cum_log_probs"),
    Field("return_routed_experts", "BOOL", 1, "SGLang: send routed_experts; the prompt is computed whole, no pages are reused"),
    Field("max_tokens", "INT32", 1, "most tokens to make"),
    Field("min_tokens", "INT32", 1, "no end before so many tokens"),
    Field("min_length", "INT32", 1, "TensorRT-LLM: min_tokens"),
    Field("n", "INT32", 1, "answers to make"),
    Field("num_return_sequences", "INT32", 1, "TensorRT-LLM: n"),
    Field("beam_width", "INT32", 1, "TensorRT-LLM: 1"),
    Field("temperature", "FP32", 1, "0 is greedy"),
    Field("top_k", "INT32", 1, "sample among so many most likely tokens; 0: all"),
    Field("top_p", "FP32", 1, "sample among the most likely tokens that have this share"),
    Field("min_p", "FP32", 1, "sample among tokens at least this share as likely as the first"),
    Field("repetition_penalty", "FP32", 1, "divides what prompt or output holds; 1: off"),
    Field("presence_penalty", "FP32", 1, "taken off what the output holds"),
    Field("frequency_penalty", "FP32", 1, "taken off for each time the output holds it"),
    Field("seed", "UINT64", 1, "same seed, same tokens"),
    Field("stop", "STRING", -1, "strings that end the text"),
    Field("stop_words", "STRING", -1, "TensorRT-LLM: stop"),
    Field("stop_token_ids", "INT32", -1, "tokens that end the text"),
    Field("end_id", "INT32", 1, "TensorRT-LLM: the token that ends the text"),
    Field("pad_id", "INT32", 1, "TensorRT-LLM: not used, rows are not padded"),
    Field("bad_words", "STRING", -1, "words that must not appear"),
    Field("ignore_eos", "BOOL", 1, "go on to max_tokens"),
    Field("include_stop_str_in_output", "BOOL", 1, "keep the stop string in the text"),
    Field("skip_special_tokens", "BOOL", 1, "leave special tokens out of the text (default true)"),
    Field("logprobs", "INT32", 1, "alternatives in logprobs"),
    Field("prompt_logprobs", "INT32", 1, "alternatives in prompt_logprobs"),
)

OUTPUTS = (
    Field("text_output", "STRING", -1, "text: what is new when streaming, else all; one for each of n"),
    Field("finish_reason", "STRING", -1, "stop, length, or None while it goes on"),
    Field("num_input_tokens", "UINT32", 1, "tokens of the prompt"),
    Field("num_output_tokens", "UINT32", -1, "tokens of this response"),
    Field("output_ids", "INT32", -1, "tokens of this response; of n answers one after another, num_output_tokens long each"),
    Field("index", "UINT32", -1, "which of n each text is, where n > 1"),
    Field("cumulative_logprob", "FP32", -1, "sum over the answer so far"),
    Field("logprobs", "STRING", -1, "JSON as in vLLM: for each token {id: {logprob, rank, decoded_token}}"),
    Field("prompt_logprobs", "STRING", 1, "JSON as logprobs, null for the first token; with the first response"),
    Field(
        "routed_experts",
        "INT32",
        -1,
        "with an answer's end: [num_input_tokens + tokens of the answer, layers with experts, experts of a token] flat, heaviest first;"
        " of n answers one after another; -1 for a last token that no other followed, since it was not computed",
    ),
    Field("output_log_probs", "FP32", -1, "TensorRT-LLM: one for each of output_ids"),
    Field("cum_log_probs", "FP32", -1, "TensorRT-LLM: cumulative_logprob"),
)

STAGE_INPUTS = (Field("MESSAGE", "UINT8", -1, "a packed step or question"), Field("ROWS", "UINT8", -1, "rows, on the tensor link"))
STAGE_OUTPUTS = (Field("MESSAGE", "UINT8", -1, "the packed answer"), Field("ROWS", "UINT8", -1, "rows, on the tensor link"))
EPLB_INPUTS = (
    Field("MESSAGE", "UINT8", -1, "a packed push of a stage"),
    Field(
        "query",
        "STRING",
        1,
        "state, or of it map, loads, balance, history; of the recorder: start [stat|per_pass|per_token [MIB]], stop, dump",
    ),
)
EPLB_OUTPUTS = (Field("MESSAGE", "UINT8", -1, "the packed offer"), Field("text_output", "STRING", 1, "JSON: the answer to query"))

_PROMPTS = ("text_input", "messages", "input_ids")
_RETURNS = {
    f"return_{name}": (name,)
    for name in ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "routed_experts")
}
_RETURNS |= {"return_output_ids": ("output_ids",), "return_log_probs": ("output_log_probs", "cum_log_probs")}
_NEED_LOGPROBS = {"logprobs", "cumulative_logprob", "output_log_probs", "cum_log_probs"}
_LISTS = {field.name for field in INPUTS if field.dim == -1}
_ALL_OUTPUTS = frozenset(field.name for field in OUTPUTS)
_OF_THE_SERVER = {"id"}  # /generate passes its own fields on as request parameters


@dataclass(frozen=True)
class Order:
    """One checked request. Exactly one of `text`, `messages`, `input_ids` is set; `sampling` is for engine.sampling."""

    sampling: dict[str, Any]
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None
    stream: bool = False
    echo: bool = False  # the prompt's text comes first in text_output
    writes: bool = True  # text_output is wanted
    returns: frozenset[str] = frozenset()  # outputs besides text_output
    add_special_tokens: bool = True
    chat: dict[str, Any] | None = None  # values for the chat template
    skip_special_tokens: bool = True
    include_stop: bool = False
    truncate: int | None = None  # prompt tokens to keep, the last
    priority: int = 0
    timeout_s: float | None = None


def read_order(tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], wanted: Collection[str] = _ALL_OUTPUTS) -> Order:
    """The Order in a request's tensors (flat lists by name) and parameters; Refusal with a sentence.

    Where a name is given more than once: tensor, then `sampling_parameters`, then request parameter. null is not given.
    `wanted`: outputs that the server passes on, which are all unless the client named some; no others are made.
    """
    given = {name: value for name, value in parameters.items() if name not in _OF_THE_SERVER and not name.startswith("triton_")}
    flat = {name: _flat(name, values) for name, values in tensors.items()}
    packed = flat.get("sampling_parameters", given.get("sampling_parameters"))
    several = {**given, **(_json_object("sampling_parameters", packed) if packed is not None else {}), **flat}
    values = _Values({name: value for name, value in several.items() if value is not None})
    values.pop("sampling_parameters", None)

    prompts = [name for name in _PROMPTS if name in values]
    if len(prompts) != 1:
        raise Refusal(
            f"{' and '.join(prompts)} are given together" if prompts else "no prompt",
            why="a request has one prompt",
            fix="send one of text_input, messages and input_ids",
        )
    stream = values.flag("stream", False)
    exclude = values.flag("exclude_input_in_output", None)
    echo = values.flag("echo", None if exclude is None else not exclude)
    if echo and stream:
        raise Refusal("the prompt cannot be repeated in a stream", why="a stream holds what is new", fix="set exclude_input_in_output=true")

    returns = {output for name, outputs in _RETURNS.items() if values.flag(name, False) for output in outputs}
    if prompts == ["input_ids"]:
        returns.add("output_ids")
    returns |= {name for name in ("logprobs", "prompt_logprobs") if name in values}
    chat = values.pop("chat_template_kwargs", None)
    order = {
        "text": values.text("text_input"),
        "messages": _json("messages", values.pop("messages")) if "messages" in values else None,
        "input_ids": values.integers("input_ids"),
        "stream": stream,
        "echo": echo if echo is not None else prompts == ["text_input"] and not stream,
        "writes": "text_output" in wanted,
        "returns": frozenset(returns.intersection(wanted)),
        "add_special_tokens": values.flag("add_special_tokens", True),
        "chat": {
            "add_generation_prompt": values.flag("add_generation_prompt", True),
            **(_json_object("chat_template_kwargs", chat) if chat else {}),
        },
        "skip_special_tokens": values.flag("skip_special_tokens", True),
        "include_stop": values.flag("include_stop_str_in_output", False),
        "truncate": values.number("truncate_prompt_tokens", int),
        "priority": values.number("priority", int) or 0,
        "timeout_s": values.number("timeout_s", float),
    }
    if order["timeout_s"] is not None and order["timeout_s"] <= 0:
        raise Refusal(f"timeout_s={order['timeout_s']} is not positive", why="the request would be over at once", fix="leave it out")
    if order["truncate"] is not None and order["truncate"] < 1:
        raise Refusal(f"truncate_prompt_tokens={order['truncate']}", why="a prompt has at least one token", fix="use 1 or more")
    sampling = dict(values)
    if returns & _NEED_LOGPROBS:
        sampling.setdefault("logprobs", 0)  # 0: the sampled token's own
    return Order(sampling=sampling, **order)


class _Values(dict[str, Any]):
    """Named values; each reader takes its name out, so that what is left over is for sampling."""

    def flag(self, name: str, default: bool | None) -> Any:
        value = self.pop(name, default)
        if isinstance(value, bool) or value is None:
            return value
        words = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() not in words:
            raise Refusal(f"{name}={value!r} is neither true nor false", why="it is a switch", fix="send true or false")
        return words[str(value).lower()]

    def number(self, name: str, kind: type) -> Any:
        value = self.pop(name, None)
        if value is None:
            return None
        try:
            number = float(value)
            if isinstance(value, bool) or number != number or kind(number) != number:
                raise ValueError
            return kind(number)
        except (TypeError, ValueError, OverflowError):
            raise Refusal(
                f"{name}={value!r} is no {'whole number' if kind is int else 'number'}", why="it must be one", fix=f"send {name}=1"
            ) from None

    def text(self, name: str) -> str | None:
        value = self.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise Refusal(f"{name}={value!r} is no text", why="it must be a string", fix=f'send {name}="Hello"')
        return value

    def integers(self, name: str) -> list[int] | None:
        values = self.pop(name, None)
        if values is None:
            return None
        if not isinstance(values, list) or set(map(type, values)) != {int}:
            raise Refusal(f"{name} is no list of token ids", why="it must hold at least one whole number", fix=f"send {name}=[1, 2, 3]")
        return values


def _flat(name: str, values: Sequence[Any]) -> Any:
    """A tensor's value: one, or a list; bytes become text. Values of a tensor are of one type."""
    try:
        flat = [value.decode() for value in values] if len(values) and isinstance(values[0], bytes) else list(values)
    except UnicodeDecodeError as error:
        raise Refusal(f"{name} is not UTF-8", why=str(error), fix="encode the text as UTF-8") from None
    if name in _LISTS:
        return flat
    if len(flat) != 1:
        raise Refusal(f"{name} holds {len(flat)} values", why="it is one value", fix=f"send {name} with shape [1]")
    return flat[0]


def _json(name: str, packed: Any) -> Any:
    if not isinstance(packed, str):
        return packed
    try:
        value = json.loads(packed)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair (\ud800) passes for JSON, and is no text
        return value
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{name} is not JSON", why=str(error), fix="check the quotes and brackets") from None


def _json_object(name: str, packed: Any) -> dict[str, Any]:
    value = _json(name, packed)
    if not isinstance(value, dict):
        raise Refusal(f"{name} is not a JSON object", why="parameters have names", fix='send {"temperature": 0.5}')
    return value
