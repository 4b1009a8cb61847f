"""Emissions become outputs: one response without streaming, deltas with it, nothing that was not asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from serve.tokenizers_for_tests import byte_level
from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Logprobs, Sampling
from trireme.serve.answer import Answer
from trireme.serve.signature import read_order
from trireme.serve.text import Text


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(byte_level())


def make(text, tokens=None, *, said="hi", **asked):
    """(Answer, order) for a prompt `said`; sampling fields and inputs by name."""
    fields = {name: asked.pop(name) for name in ("stop", "n", "min_tokens", "logprobs") if name in asked}
    order = read_order({"text_input": [said.encode()], **{name: [value] for name, value in asked.items()}}, {})
    return Answer(order, Sampling(max_tokens=100, **fields), [1, 2, 3], said, text)


def emit(tokens, finish=None, index=0, **more):
    return Emission(request_id="r", index=index, tokens=tokens, finish_reason=finish, **more)


def test_one_response_without_streaming(text):
    answer, tokens = make(text), text.encode(" Paris. 😀")
    for token in tokens:
        assert answer.outputs() is None
        answer.take(emit([token]))
    answer.take(emit([], "stop"))
    assert answer.done and answer.outputs() == {"text_output": ["hi Paris. 😀"]}


def test_stream_of_deltas_without_empty_ones(text):
    answer, tokens = make(text, stream=True), text.encode("ok 😀 wörld")
    pieces = []
    for token in tokens:
        answer.take(emit([token]))
        outputs = answer.outputs()
        if outputs is not None:
            assert list(outputs) == ["text_output"] and outputs["text_output"][0] and "\ufffd" not in outputs["text_output"][0]
            pieces += outputs["text_output"]
    answer.take(emit([], "stop"))
    assert answer.done and answer.outputs() is None  # nothing more to say: FINAL goes alone
    assert "".join(pieces) == "ok 😀 wörld"


def test_emissions_that_wait_go_in_one_response(text):
    answer, tokens = make(text, stream=True, return_num_output_tokens=True), text.encode("the capital of France")
    for token in tokens:
        answer.take(emit([token]))
    assert answer.outputs() == {"text_output": ["the capital of France"], "num_output_tokens": [len(tokens)]}
    assert answer.outputs() is None


def test_an_answer_of_no_tokens_is_still_a_response(text):
    answer = make(text, stream=True)
    answer.take(emit([], "stop"))
    assert answer.done and answer.outputs() == {"text_output": [""]}


def test_counts_and_reason(text):
    answer = make(text, stream=True, return_finish_reason=True, return_num_input_tokens=True, return_num_output_tokens=True)
    answer.take(emit(text.encode("the")))
    first = answer.outputs()
    assert first is not None and first["finish_reason"] == ["None"] and first["num_input_tokens"] == [3]
    answer.take(emit([], "length"))
    last = answer.outputs()
    assert last == {"text_output": [""], "finish_reason": ["length"], "num_input_tokens": [3], "num_output_tokens": [0]}


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(text, include):
    answer = make(
        text, stream=True, stop=("is Par",), include_stop_str_in_output=include, return_finish_reason=True, return_output_ids=True
    )
    tokens = text.encode("of France is Paris. user")
    found, out, ids = [], "", []
    for token in tokens:
        found.append(answer.take(emit([token])))
        outputs = answer.outputs()
        if outputs:
            out, ids = out + outputs["text_output"][0], ids + outputs["output_ids"]
            if outputs["finish_reason"] == ["stop"]:
                break
    assert out == ("of France is Par" if include else "of France ")
    assert found[-1] and found.count(True) == 1 and answer.done
    assert ids == tokens[: len(ids)] and text.decode(ids).startswith("of France is Par")
    assert not answer.take(emit([5], "cancelled", error=Refusal("late", kind="cancelled"))) and answer.error is None


def test_tokens_behind_a_stop_string_are_dropped(text):
    answer = make(text, stop=("France",), exclude_input_in_output=True, return_num_output_tokens=True)
    tokens = text.encode("of France is Paris")
    assert answer.take(emit(tokens))
    outputs = answer.outputs()
    assert outputs is not None and outputs["text_output"] == ["of "] and outputs["num_output_tokens"][0] < len(tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 9])
@pytest.mark.parametrize("stop", [None, "is Par", "s", "😀", "of France is Paris. 😀 user", "never"])
@pytest.mark.parametrize("finish", [None, "length", "stop"])
def test_emissions_of_several_tokens_say_the_same(text, stop, min_tokens, stream, finish):
    """As a step that verifies drafts brings them: wherever a stop string begins and ends in them, and whatever comes with them."""
    tokens = text.encode("of France is Paris. 😀 user the end")
    returns: dict[str, Any] = {
        "return_finish_reason": True,
        "return_num_output_tokens": True,
        "return_output_ids": True,
        "return_logprobs": True,
    }
    entries = [Logprobs(token, -1.0, 1, [], []) for token in tokens]

    def answer(size: int) -> tuple[dict[str, list], list[bool]]:
        answer = make(
            text, stream=stream, stop=(stop,) if stop else (), min_tokens=min_tokens, logprobs=0, exclude_input_in_output=True, **returns
        )
        told, found = {"text": [""], "tokens": [], "values": []}, []
        for first in range(0, len(tokens), size):
            is_last = first + size >= len(tokens)
            found.append(
                answer.take(emit(tokens[first : first + size], finish if is_last else None, logprobs=entries[first : first + size]))
            )
            if (outputs := answer.outputs()) is not None:
                told["text"][0] += outputs["text_output"][0]
                told["tokens"] += outputs["output_ids"]
                told["values"] += json.loads(outputs["logprobs"][0])
                told["finish"] = outputs["finish_reason"]
            if answer.done:
                break
        return told, found

    alone, _ = answer(1)
    for size in (2, 3, 4, len(tokens)):
        together, found = answer(size)
        assert together == alone
        # The engine is told of a stop string, unless it has ended the sequence in the same emission.
        assert found.count(True) == (alone.get("finish") == ["stop"] and not (finish and len(found) == -(-len(tokens) // size)))


def test_stop_string_waits_for_min_tokens(text):
    tokens = text.encode("France France France")
    answer = make(text, stop=("France",), min_tokens=len(tokens) - 1, exclude_input_in_output=True)
    for token in tokens:
        if answer.take(emit([token])):
            break
    outputs = answer.outputs()
    assert outputs is not None and outputs["text_output"][0].startswith("France France")


def test_held_text_comes_out_at_the_end(text):
    answer = make(text, stop=("FranceX",), exclude_input_in_output=True)
    answer.take(emit(text.encode("of France")))
    answer.take(emit([], "length"))
    assert answer.outputs() == {"text_output": ["of France"]}


def test_n_answers(text):
    answer = make(text, n=2, return_output_ids=True, exclude_input_in_output=True)
    one, two = text.encode("the capital"), text.encode("user")
    answer.take(emit(two, "stop", index=1))
    assert not answer.done and answer.outputs() is None
    answer.take(emit(one, "length"))
    assert answer.outputs() == {
        "text_output": ["the capital", "user"],
        "index": [0, 1],
        "output_ids": one + two,
        "num_output_tokens": [len(one), len(two)],
    }


def test_n_answers_streamed(text):
    answer = make(text, n=2, stream=True)
    answer.take(emit(text.encode("user"), index=1))
    assert answer.outputs() == {"text_output": ["user"], "index": [1]}
    answer.take(emit(text.encode("the"), "stop"))
    assert answer.outputs() == {"text_output": ["the"], "index": [0]} and not answer.done


def test_logprobs_in_the_schema_of_vllm(text):
    the, of = text.encode("the")[0], text.encode("of")[0]
    answer = make(
        text, logprobs=1, return_logprobs=True, return_cumulative_logprob=True, return_log_probs=True, exclude_input_in_output=True
    )
    answer.take(emit([the], logprobs=[Logprobs(the, -1.5, 2, [of], [-0.5])]))
    answer.take(emit([of], "length", logprobs=[Logprobs(of, -0.25, 1, [of], [-0.25])]))
    outputs = answer.outputs()
    assert outputs is not None
    assert json.loads(outputs["logprobs"][0]) == [
        {
            str(the): {"logprob": -1.5, "rank": 2, "decoded_token": text.decode([the])},
            str(of): {"logprob": -0.5, "rank": 1, "decoded_token": text.decode([of])},
        },
        {str(of): {"logprob": -0.25, "rank": 1, "decoded_token": text.decode([of])}},
    ]
    assert outputs["cumulative_logprob"] == outputs["cum_log_probs"] == [-1.75]
    assert outputs["output_log_probs"] == [-1.5, -0.25]


def test_prompt_logprobs_once(text):
    answer = make(text, stream=True, prompt_logprobs=1)
    answer.take(emit(text.encode("the"), prompt_logprobs=[None, Logprobs(5, -1.0, 1, [5], [-1.0])]))
    outputs = answer.outputs()
    assert outputs is not None and json.loads(outputs["prompt_logprobs"][0])[0] is None
    answer.take(emit(text.encode("user")))
    assert answer.outputs() == {"text_output": ["user"]}


def routed(*rows: int) -> np.ndarray:
    """Of rows with these numbers: two layers of two experts each."""
    return np.array([[row, row + 1, row + 2, row + 3] for row in rows], np.int16)


def test_experts_come_with_the_end_of_each_answer(text):
    """Of three prompt tokens and what each answer has; a last token that no other followed was not computed."""
    answer, (the, of) = make(text, stream=True, n=2, return_routed_experts=True), [text.encode(word)[0] for word in ("the", " of")]
    answer.take(emit([the], routed_experts=routed(0, 1, 2)))
    answer.take(emit([of], index=1, routed_experts=routed(10, 11, 12)))
    outputs = answer.outputs()
    assert outputs is not None and "routed_experts" not in outputs
    answer.take(emit([of], "length", routed_experts=routed(3)))
    outputs = answer.outputs()
    assert outputs is not None and list(outputs["index"]) == [0]
    assert outputs["routed_experts"].tolist() == [*routed(0, 1, 2, 3).ravel(), -1, -1, -1, -1]
    answer.take(emit([], "stop", index=1, routed_experts=routed(13)))
    outputs = answer.outputs()
    assert outputs is not None and outputs["routed_experts"].tolist() == routed(10, 11, 12, 13).ravel().tolist()


def test_experts_of_n_answers_in_one_response(text):
    answer, of = make(text, n=2, return_routed_experts=True), text.encode(" of")[0]
    for index in (1, 0):
        answer.take(emit([of], "length", index=index, routed_experts=routed(index, 5, 6)))
    outputs = answer.outputs()
    assert outputs is not None
    both = outputs["routed_experts"].reshape(2, 4, 4)
    assert both[:, 0, 0].tolist() == [0, 1] and (both[:, 3] == -1).all()


def test_experts_of_tokens_behind_a_stop_string_are_dropped(text):
    answer = make(text, stop=("France",), return_routed_experts=True, return_num_output_tokens=True)
    tokens = text.encode("of France is Paris")
    assert answer.take(emit(tokens, routed_experts=routed(*range(len(tokens) + 2))))
    outputs = answer.outputs()
    assert outputs is not None
    assert len(outputs["routed_experts"]) == 4 * (3 + outputs["num_output_tokens"][0]) < 4 * (2 + len(tokens))


def test_tokens_alone_without_a_tokenizer():
    order = read_order({"input_ids": [1, 2], "stream": [True]}, {})
    answer = Answer(order, Sampling(max_tokens=9), [1, 2], "", None)
    answer.take(emit([7, 8]))
    assert answer.outputs() == {"text_output": [""], "output_ids": [7, 8]}


def test_text_is_not_made_where_only_tokens_are_wanted(text):
    order = read_order({"input_ids": [1, 2], "stream": [True]}, {}, ["output_ids"])
    answer, tokens = Answer(order, Sampling(max_tokens=9), [1, 2], "", text), text.encode("ok 😀")
    for token in tokens:
        answer.take(emit([token]))
        assert answer.outputs() == {"output_ids": [token]}
    answer.take(emit([], "stop"))
    assert answer.outputs() == {"output_ids": []}  # how it ended may matter to somebody


def test_a_stop_string_ends_it_where_only_tokens_are_wanted(text):
    order = read_order({"text_input": [b"hi"], "return_output_ids": [True]}, {}, ["output_ids"])
    answer, tokens = Answer(order, Sampling(max_tokens=9, stop=("France",)), [1, 2], "", text), text.encode("of France is")
    assert answer.take(emit(tokens)) and answer.done
    outputs = answer.outputs()
    assert outputs is not None and len(outputs["output_ids"]) < len(tokens)


def test_errors_end_it(text):
    answer = make(text, n=2)
    answer.take(emit([], "deadline", error=Refusal("too late", kind="deadline")))
    assert answer.done and "too late" in str(answer.error)
