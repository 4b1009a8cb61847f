"""gRPC streams of a real server: payloads of benchmark tools verbatim, cancellation, and a mixed load."""

from __future__ import annotations

import json
import queue
import random
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc

from serve.tokenizers_for_tests import WORDS
from tiny import greedy_tokens

TYPES = {"text_input": "BYTES", "sampling_parameters": "BYTES", "stream": "BOOL", "exclude_input_in_output": "BOOL", "ignore_eos": "BOOL"}
TYPES |= {"return_finish_reason": "BOOL", "temperature": "FP32"}
NUMPY = {"BYTES": np.object_, "BOOL": bool, "INT32": np.int32, "FP32": np.float32}


class Stream:
    """One gRPC stream. `ask` sends inputs as lists; `answer` collects one request's responses up to the final one."""

    def __init__(self, server):
        self.client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self.replies: queue.Queue = queue.Queue()
        self.client.start_stream(lambda result, error: self.replies.put((result, error)))

    def ask(self, *outputs: str, **inputs: list[Any]) -> None:
        """`outputs`: those wanted; none named: all there are."""
        tensors = []
        for name, values in inputs.items():
            kind = TYPES.get(name, "INT32")
            tensor = grpc.InferInput(name, [len(values)], kind)
            tensor.set_data_from_numpy(np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=NUMPY[kind]))
            tensors.append(tensor)
        wanted = [grpc.InferRequestedOutput(name) for name in outputs] or None
        self.client.async_stream_infer("llm", tensors, outputs=wanted, enable_empty_final_response=True)

    def next(self) -> tuple[dict[str, list[Any]], bool]:
        """(outputs by name, whether it is the final response); raises the server's error."""
        result, error = self.replies.get(timeout=60)
        if error is not None:
            raise error
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        return {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}, final

    def answer(self, *wanted: str, **inputs: list[Any]) -> list[dict[str, list[Any]]]:
        self.ask(*wanted, **inputs)
        responses, final = [], False
        while not final:
            outputs, final = self.next()
            responses += [outputs] if outputs else []
        return responses

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


@pytest.fixture
def stream(server):
    stream = Stream(server)
    yield stream
    stream.close()


def test_perf_analyzer(stream):
    """Triton's own L0_perf_vllm, with fewer tokens."""
    data = '{"data":[{"text_input":["hi hi hi"],"stream":[true],"sampling_parameters":["{\\"max_tokens\\":24,\\"ignore_eos\\":true}"]}]}'
    responses = stream.answer(**json.loads(data)["data"][0])
    assert responses and all(response["text_output"][0] for response in responses)


def test_genai_perf_for_vllm(stream, text):
    responses = stream.answer(
        text_input=["the capital of France is"],
        exclude_input_in_output=[True],
        stream=[True],
        sampling_parameters=['{"max_tokens":"20","min_tokens":"20"}'],
    )
    assert all(set(response) == {"text_output"} and len(response["text_output"]) == 1 for response in responses)
    assert responses[0]["text_output"][0] and not b"".join(r["text_output"][0] for r in responses).startswith(b"the capital of France is")


def test_genai_perf_for_tensorrtllm(stream):
    responses = stream.answer(text_input=["the capital"], max_tokens=[16], min_length=[16], exclude_input_in_output=[True], stream=[True])
    assert responses and all(response["text_output"][0] for response in responses)


def test_genai_perf_generate(server):
    pieces = server.stream(text_input=["the capital"], stream=True, max_tokens=16, seed=1)  # one whose first token does not end it
    assert pieces and all(piece["text_output"] for piece in pieces)


def test_inputs_are_optional_and_of_known_shape(stream):
    """What perf_analyzer reads: it skips optional inputs, and needs --shape for variable ones."""
    metadata = stream.client.get_model_metadata("llm")
    config = stream.client.get_model_config("llm").config
    assert all(tensor.optional for tensor in config.input) and config.model_transaction_policy.decoupled and config.max_batch_size == 0
    shapes = {tensor.name: list(tensor.shape) for tensor in metadata.inputs}
    assert all(shapes[name] == [1] for name in ("text_input", "stream", "sampling_parameters", "max_tokens", "exclude_input_in_output"))


def test_only_the_outputs_that_a_client_names(stream):
    asked = {"input_ids": [5, 6, 7], "max_tokens": [12], "stream": [True], "ignore_eos": [True], "temperature": [0.0]}
    every = stream.answer(**asked)
    tokens = stream.answer("output_ids", **asked)
    assert all(set(response) == {"text_output", "output_ids"} for response in every)
    assert all(set(response) == {"output_ids"} for response in tokens)
    joined = [[token for response in responses for token in response["output_ids"]] for responses in (every, tokens)]
    assert joined[0] == joined[1] and len(joined[0]) == 12


def test_cancelled_stream_gives_its_pages_back(server):
    stream = Stream(server)
    before = _finished(server)
    stream.ask(input_ids=[5, 6, 7], max_tokens=[400], stream=[True], ignore_eos=[True])
    stream.next()
    stream.close(cancel=True)
    server.await_metric("requests_finished_total", before + 1, reason="cancelled")
    server.await_metric("pages_used", 0)


def test_a_client_that_hangs_up_is_cancelled(server):
    before = _finished(server)
    body = json.dumps({"input_ids": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.http)) as client:
        client.sendall(b"POST /v2/models/llm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    server.await_metric("requests_finished_total", before + 1, reason="cancelled")
    server.await_metric("pages_used", 0)


def _finished(server) -> float:
    time.sleep(1.5)  # the page is a second behind
    return server.metric("requests_finished_total", reason="cancelled")


def test_a_load_of_good_bad_and_cancelled_requests(server, checkpoint, text):
    """Every good one ends with its exact tokens, every bad one with a sentence; pages return."""
    rng = random.Random(0)
    words = WORDS.split()
    prompts = [text.encode(" ".join(rng.choices(words, k=rng.randrange(1, 15)))) for _ in range(8)]
    expected = greedy_tokens(checkpoint, prompts, 30)
    faults: list[str] = []

    def good(number: int) -> None:
        prompt, tokens = prompts[number % 8], expected[number % 8]
        length = 5 + number % 26
        stream = Stream(server)
        responses = stream.answer(input_ids=prompt, max_tokens=[length], stream=[True], ignore_eos=[True], temperature=[0.0])
        said = [token for response in responses for token in response["output_ids"]]
        if said != tokens[:length]:
            faults.append(f"{number}: {said} is not {tokens[:length]}")
        if b"".join(r["text_output"][0] for r in responses).decode() != text.decode(tokens[:length]):
            faults.append(f"{number}: text")
        stream.close()

    def bad(number: int) -> None:
        stream = Stream(server)
        try:
            stream.answer(text_input=["hi"], sampling_parameters=['{"temperature": "hot"}'])
            faults.append(f"{number}: not refused")
        except grpc.InferenceServerException as error:
            if "is not a number" not in str(error):
                faults.append(f"{number}: {error}")
        stream.close()

    def cancelled(number: int) -> None:
        stream = Stream(server)
        stream.ask(input_ids=prompts[number % 8], max_tokens=[400], stream=[True], ignore_eos=[True])
        time.sleep(0.05 * (number % 5))
        stream.close(cancel=True)

    def run(number: int) -> None:
        try:
            (bad if number % 8 == 3 else cancelled if number % 8 == 6 else good)(number)
        except Exception as error:
            faults.append(f"{number}: {error!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not faults and not any(thread.is_alive() for thread in threads)
    server.await_metric("requests_running", 0)
    server.await_metric("pages_used", 0)
