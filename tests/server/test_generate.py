"""/generate and /generate_stream of a real server: transformers' tokens, one response or deltas, sentences for bad requests."""

from __future__ import annotations

import json
import time

import pytest

from tiny import greedy_tokens
from trireme.core.control import Join, Status, pack_ask

PROMPT = "the capital of France is"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(checkpoint, text):
    """transformers' 24 tokens after PROMPT."""
    (tokens,) = greedy_tokens(checkpoint, [text.encode(PROMPT)], 24)
    return tokens


def test_tokens_equal_transformers(server, text, expected):
    status, answer = server.generate(input_ids=text.encode(PROMPT), max_tokens=24, **GREEDY)
    assert status == 200 and answer["output_ids"] == expected and answer["text_output"] == text.decode(expected)


def test_text_with_and_without_the_prompt(server, text, expected):
    status, answer = server.generate(text_input=PROMPT, max_tokens=24, **GREEDY)
    assert status == 200 and answer == {"model_name": "llm", "model_version": "1", "text_output": PROMPT + text.decode(expected)}
    _, answer = server.generate(text_input=PROMPT, max_tokens=24, exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == text.decode(expected)


def test_stream_is_the_same_text_in_whole_characters(server, text, expected):
    pieces = [piece["text_output"] for piece in server.stream(text_input=PROMPT, max_tokens=24, **GREEDY)]
    assert all(pieces) and len(pieces) > 3
    assert "".join(pieces) == text.decode(expected)


def test_chat(server, checkpoint, text):
    messages = [{"role": "user", "content": "Hello there!"}]
    prompt = text.encode(text.render(messages), add_special_tokens=False)
    status, answer = server.generate(messages=json.dumps(messages), max_tokens=8, return_output_ids=True, **GREEDY)
    assert status == 200 and answer["output_ids"] == greedy_tokens(checkpoint, [prompt], 8)[0]


def test_everything_that_can_be_asked_for(server, text, expected):
    status, answer = server.generate(
        text_input=PROMPT,
        max_tokens=3,
        **GREEDY,
        **{f"return_{name}": True for name in ("finish_reason", "num_input_tokens", "num_output_tokens", "output_ids", "log_probs")},
        return_cumulative_logprob=True,
        logprobs=2,
        prompt_logprobs=0,
    )
    assert status == 200
    assert (answer["finish_reason"], answer["num_input_tokens"], answer["num_output_tokens"]) == ("length", len(text.encode(PROMPT)), 3)
    logprobs, prompt = json.loads(answer["logprobs"]), json.loads(answer["prompt_logprobs"])
    assert [next(iter(entry)) for entry in logprobs] == [str(token) for token in expected[:3]] and len(logprobs[0]) == 2
    assert [entry[str(token)]["logprob"] for entry, token in zip(logprobs, expected, strict=False)] == pytest.approx(
        answer["output_log_probs"]
    )
    assert answer["cumulative_logprob"] == answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), abs=1e-5)
    assert prompt[0] is None and len(prompt) == len(text.encode(PROMPT))


def test_stop_string(server, text, expected):
    whole = text.decode(expected)
    stop = whole[5:8]
    status, answer = server.generate(
        text_input=PROMPT, max_tokens=24, stop=["never", stop], exclude_input_in_output=True, return_finish_reason=True, **GREEDY
    )
    assert status == 200 and answer["text_output"] == whole[: whole.find(stop)] and answer["finish_reason"] == "stop"
    pieces = server.stream(text_input=PROMPT, max_tokens=24, stop_words=[stop], **GREEDY)
    assert "".join(piece["text_output"] for piece in pieces) == whole[: whole.find(stop)]


def test_several_answers(server, text):
    asked = {"text_input": PROMPT, "n": 3, "seed": 5, "max_tokens": 6, "ignore_eos": True, "return_output_ids": True}
    _, first = server.generate(**asked)
    _, again = server.generate(**asked)
    assert first == again and first["index"] == [0, 1, 2] and first["num_output_tokens"] == [6, 6, 6] and len(first["text_output"]) == 3
    assert len({tuple(first["output_ids"][at : at + 6]) for at in (0, 6, 12)}) > 1
    streamed: dict[int, str] = {}
    for piece in server.stream(**asked):
        for index, said in zip(
            *(value if isinstance(value, list) else [value] for value in (piece["index"], piece["text_output"])), strict=True
        ):
            streamed[index] = streamed.get(index, "") + said
    assert [PROMPT + streamed[index] for index in range(3)] == first["text_output"]


def test_a_parameter_means_the_same_wherever_it_stands(server):
    asked = {"text_input": PROMPT, "max_tokens": 8, "ignore_eos": True}
    _, as_input = server.generate(**asked, temperature=0.7, seed=3)
    _, as_json = server.generate(**asked, sampling_parameters=json.dumps({"temperature": "0.7", "seed": "3"}))
    _, as_parameter = server.generate(**asked, parameters={"temperature": 0.7, "seed": 3})
    assert as_input == as_json == as_parameter


def test_truncated_prompt(server, text):
    tokens = text.encode(PROMPT)
    _, cut = server.generate(
        text_input=PROMPT, truncate_prompt_tokens=3, max_tokens=4, return_output_ids=True, return_num_input_tokens=True, **GREEDY
    )
    _, short = server.generate(input_ids=tokens[-3:], max_tokens=4, **GREEDY)
    assert cut["output_ids"] == short["output_ids"] and cut["num_input_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "no prompt"),
        ({"text_input": PROMPT, "temprature": 1.0}, "did you mean 'temperature'"),
        ({"text_input": PROMPT, "top_p": 3.0}, "out of range"),
        ({"text_input": PROMPT, "sampling_parameters": "{"}, "not JSON"),
        ({"text_input": PROMPT, "beam_width": 4}, "not supported"),
        ({"input_ids": [100000]}, "vocabulary"),
        ({"input_ids": [5] * 600}, "max_model_len"),
        ({"text_input": "a" * (1 << 20)}, "a text of 1048576 characters is too long"),
        ({"text_input": PROMPT, "stream": True, "exclude_input_in_output": False}, "cannot be repeated"),
        ({"messages": "[]"}, "bad messages"),
        ({"text_input": PROMPT, "sampling_parameters": r'{"stop": ["\ud800"]}'}, "surrogates not allowed"),
        ({"text_input": PROMPT, "timeout_s": 0.001, "max_tokens": 400, "ignore_eos": True}, "deadline"),
    ],
)
def test_bad_requests_get_a_sentence(server, body, sentence):
    status, answer = server.generate(**body)
    assert 400 <= status < 600 and sentence in answer["error"], answer
    status, answer = server.generate(text_input="ok", max_tokens=1)
    assert status == 200


@pytest.mark.parametrize("message", [b"", b"S", pack_ask(Status()), pack_ask(Join(10**6)), bytes(32) + pack_ask(Join(10**6))])
def test_stages_take_orders_from_their_own_server_alone(server, message):
    tensor = {"name": "MESSAGE", "shape": [len(message)], "datatype": "UINT8", "data": list(message)}
    status, answer = server.post("/v2/models/stage_0/infer", {"inputs": [tensor]})
    assert status == 400 and "outside the server" in answer
    status, _ = server.generate(text_input="ok", max_tokens=1)
    assert status == 200 and " broke: " not in server.log


def test_metrics_page(server):
    time.sleep(2.5)  # the page is a second behind
    before = {name: server.metric(name) for name in ("generation_tokens_total", "prompt_tokens_total")}
    server.generate(input_ids=[5, 6, 7], max_tokens=11, **GREEDY)
    server.await_metric("generation_tokens_total", before["generation_tokens_total"] + 11)
    server.await_metric("prompt_tokens_total", before["prompt_tokens_total"] + 3)
    assert server.metric("time_to_first_token_seconds_count") > 0
    assert server.metric("bls_hop_seconds_bucket", le="+Inf") == server.metric("bls_hop_seconds_count")
    for stage in ("0", "1"):
        assert server.metric("stage_busy_seconds_total", stage=stage) > 0
        assert server.metric("rank_state", stage=stage, rank="0", state="ready") == 1
