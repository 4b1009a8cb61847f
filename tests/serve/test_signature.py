"""Reading requests: names of both worlds, precedence, coercion, refusals. Payloads of benchmark tools stand in tests/server."""

from __future__ import annotations

import json

import pytest

from trireme.core.refusal import Refusal
from trireme.engine.sampling import Defaults, make_sampling, names
from trireme.serve.signature import INPUTS, OUTPUTS, read_order


def order(parameters=None, **tensors):
    return read_order({name: value if isinstance(value, list) else [value] for name, value in tensors.items()}, parameters or {})


def sampling(order):
    return make_sampling(order.sampling, Defaults(), vocab_size=1000, prompt_len=5, max_model_len=500)


def test_precedence_tensor_json_parameter_default():
    assert sampling(order(text_input=b"hi")).max_tokens == 256
    assert sampling(order({"max_tokens": 3}, text_input=b"hi")).max_tokens == 3
    packed = json.dumps({"max_tokens": 4}).encode()
    assert sampling(order({"max_tokens": 3}, text_input=b"hi", sampling_parameters=packed)).max_tokens == 4
    assert sampling(order({"max_tokens": 3}, text_input=b"hi", sampling_parameters=packed, max_tokens=5)).max_tokens == 5
    assert sampling(order({"sampling_parameters": '{"max_tokens": 6}'}, text_input=b"hi")).max_tokens == 6


def test_numbers_as_strings():
    packed = json.dumps({"max_tokens": "100", "temperature": "0", "stream": "true", "priority": "2"}).encode()
    read = order(text_input=b"hi", sampling_parameters=packed)
    assert (sampling(read).max_tokens, sampling(read).greedy, read.stream, read.priority) == (100, True, True, 2)


def test_names_of_tensorrt_llm():
    read = order(text_input=b"hi", max_tokens=9, min_length=4, stop_words=[b"a", b"b"], end_id=7, return_log_probs=True)
    made = sampling(read)
    assert (made.max_tokens, made.min_tokens, made.stop, made.stop_token_ids, made.logprobs) == (9, 4, ("a", "b"), (7,), 0)
    assert read.returns == {"output_log_probs", "cum_log_probs"}


@pytest.mark.parametrize(
    ("tensors", "echo"),
    [
        ({"text_input": b"hi"}, True),  # both backends repeat the prompt where nobody says otherwise
        ({"text_input": b"hi", "exclude_input_in_output": True}, False),
        ({"text_input": b"hi", "echo": False}, False),
        ({"text_input": b"hi", "stream": True}, False),
        ({"input_ids": [1, 2]}, False),
        ({"messages": b'[{"role": "user", "content": "hi"}]'}, False),
        ({"messages": b'[{"role": "user", "content": "hi"}]', "echo": True}, True),
    ],
)
def test_when_the_prompt_is_repeated(tensors, echo):
    assert order(**tensors).echo is echo


def test_outputs_only_when_asked():
    assert order(text_input=b"hi").returns == frozenset()
    assert order(text_input=b"hi", return_finish_reason=True, return_num_output_tokens=False).returns == {"finish_reason"}
    assert order(input_ids=[1]).returns == {"output_ids"}
    assert order(text_input=b"hi", return_output_ids=True).returns == {"output_ids"}
    assert order(text_input=b"hi", logprobs=2, prompt_logprobs=1).returns == {"logprobs", "prompt_logprobs"}
    assert order(text_input=b"hi", return_routed_experts=True).returns == {"routed_experts"}
    read = order(text_input=b"hi", return_cumulative_logprob=True)
    assert read.returns == {"cumulative_logprob"} and sampling(read).logprobs == 0


def test_a_client_that_names_outputs_gets_no_others():
    tensors = {"input_ids": [1, 2], "return_finish_reason": [True]}
    read = read_order(tensors, {}, ["output_ids"])
    assert read.returns == {"output_ids"} and not read.writes
    assert read_order(tensors, {}, ["text_output", "finish_reason"]).returns == {"finish_reason"}
    assert order(**tensors).writes


@pytest.mark.parametrize(
    ("tensors", "parameters", "sentence"),
    [
        ({}, {}, "no prompt"),
        ({"text_input": b"hi", "input_ids": [1]}, {}, "given together"),
        ({"input_ids": []}, {}, "at least one"),
        ({"input_ids": [1.5]}, {}, "no list of token ids"),
        ({"text_input": b"\xff\xfe"}, {}, "not UTF-8"),
        ({"text_input": [b"a", b"b"]}, {}, "holds 2 values"),
        ({"text_input": b"hi", "sampling_parameters": b"{"}, {}, "not JSON"),
        ({"text_input": b"hi", "sampling_parameters": b"[1]"}, {}, "not a JSON object"),
        ({"text_input": b"hi", "stream": True, "exclude_input_in_output": False}, {}, "cannot be repeated in a stream"),
        ({"text_input": b"hi"}, {"stream": "maybe"}, "neither true nor false"),
        ({"text_input": b"hi"}, {"priority": "high"}, "no whole number"),
        ({"text_input": b"hi"}, {"timeout_s": -1}, "not positive"),
        ({"text_input": b"hi"}, {"truncate_prompt_tokens": 0}, "at least one token"),
        ({"text_input": b"hi"}, {"temprature": 0.5}, "did you mean 'temperature'"),
        ({"text_input": b"hi"}, {"top_p": 7}, "out of range"),
        ({"messages": b"hello"}, {}, "not JSON"),
        ({"messages": b"[" * 100_000}, {}, "not JSON"),
        ({"messages": rb'[{"role": "user", "content": "\ud800"}]'}, {}, "not JSON: .* surrogates"),
        ({"text_input": b"hi", "sampling_parameters": rb'{"stop": ["\udc00"]}'}, {}, "not JSON: .* surrogates"),
        ({"sampling_parameters": b'{"text_input": 5}'}, {}, "is no text"),
        ({"sampling_parameters": b'{"input_ids": [true]}'}, {}, "no list of token ids"),
        ({"text_input": b"hi", "sampling_parameters": b'{"logprobs": []}'}, {}, "not a whole number"),
    ],
)
def test_refusals_are_sentences(tensors, parameters, sentence):
    with pytest.raises(Refusal, match=sentence) as refused:
        sampling(order(parameters, **tensors))
    assert refused.value.kind == "invalid" and refused.value.fix


def test_null_is_not_given():
    packed = b'{"text_input": null, "add_special_tokens": null, "skip_special_tokens": null, "stream": null, "logprobs": null}'
    read = order(input_ids=[1], sampling_parameters=packed)
    assert read.add_special_tokens and read.skip_special_tokens and not read.stream
    assert read.sampling == {} and read.returns == {"output_ids"}


def test_what_the_server_adds_is_no_parameter():
    assert order({"id": "abc", "triton_enable_empty_final_response": True}, text_input=b"hi").sampling == {}


def test_table_is_whole():
    assert len({field.name for field in INPUTS}) == len(INPUTS)
    assert len({field.name for field in OUTPUTS}) == len(OUTPUTS)
    assert all(field.about for field in (*INPUTS, *OUTPUTS))
    own = {field.name for field in INPUTS} - set(names())
    for name in own - {"text_input", "messages", "input_ids"}:  # each that sampling does not know is read here
        packed = {"sampling_parameters": b"{}", "chat_template_kwargs": b"{}", "stream": True, "timeout_s": 2.0}.get(name, 1)
        assert name not in order(text_input=b"hi", **{name: packed}).sampling
