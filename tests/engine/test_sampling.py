"""Sampling parameters: both spellings, strings for numbers, defaults of the checkpoint, and refusals a user understands."""

import json

import numpy as np
import pytest

from trireme.core.refusal import Refusal
from trireme.engine.sampling import Defaults, make_sampling


def make(values=None, defaults=None, *, prompt_len=10, max_model_len=100, **given):
    make_given = {"vocab_size": 1000, "prompt_len": prompt_len, "max_model_len": max_model_len, "draw_seed": lambda: 77, **given}
    return make_sampling(values or {}, defaults or Defaults(eos_token_ids=(2, 3), max_tokens=40), **make_given)


def write(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_defaults_of_a_checkpoint(tmp_path):
    write(tmp_path, config={"eos_token_id": 5, "text_config": {"eos_token_id": 6}})
    assert Defaults.of(tmp_path) == Defaults(eos_token_ids=(5, 6))
    write(tmp_path, generation_config={"eos_token_id": [9, 5], "do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    assert Defaults.of(tmp_path, 7) == Defaults(eos_token_ids=(9, 5, 6), max_tokens=7, temperature=0.6, top_k=20, top_p=0.95)
    assert Defaults.of(tmp_path / "nothing") == Defaults()


def test_defaults_apply_and_can_be_overridden():
    defaults = Defaults(eos_token_ids=(2,), temperature=0.6, top_k=20, max_tokens=40)
    assert (make({}, defaults).temperature, make({}, defaults).top_k, make({}, defaults).max_tokens) == (0.6, 20, 40)
    assert make({"temperature": 0, "top_k": -1}, defaults).greedy
    assert make({"temperature": 1e-40}).greedy and not make({"temperature": 1e-4}).greedy
    assert make({"top_k": -1}, defaults).top_k == 0
    assert make({}, defaults, prompt_len=90).max_tokens == 10


def test_payloads_of_the_field():
    genai_perf_vllm = make({"max_tokens": "100", "min_tokens": "90"}, prompt_len=1, max_model_len=500)
    assert (genai_perf_vllm.max_tokens, genai_perf_vllm.min_tokens) == (100, 90)
    trt = make(
        {"max_tokens": np.array([20]).item(), "min_length": np.int32(5), "bad_words": "", "stop_words": "", "end_id": 2, "pad_id": 2}
    )
    assert (trt.max_tokens, trt.min_tokens, trt.stop, trt.bad_words, trt.stop_token_ids) == (20, 5, (), (), (2,))
    more = make({"random_seed": "7", "stop_words": ["a", b"b"], "return_log_probs": "true", "beam_width": 1, "num_return_sequences": 2})
    assert (more.seed, more.stop, more.logprobs, more.n) == (7, ("a", "b"), 0, 2)
    vllm = make({"temperature": "0", "stop": '["x", "y"]', "logit_bias": {"5": "200"}, "seed": None, "use_beam_search": False})
    assert (vllm.greedy, vllm.stop, vllm.logit_bias, vllm.seed) == (True, ("x", "y"), {5: 100.0}, 77)


@pytest.mark.parametrize("given, seed", [({}, 77), ({"seed": -1}, 77), ({"seed": 0}, 0), ({"seed": "5"}, 5)])
def test_seed(given, seed):
    assert make(given).seed == seed


def test_drawn_seeds_differ():
    defaults = Defaults()
    assert len({make_sampling({}, defaults, vocab_size=9, prompt_len=1, max_model_len=9).seed for _ in range(20)}) == 20


def test_stop_token_ids():
    assert make().stop_token_ids == (2, 3)
    assert make({"stop_token_ids": [7, 2]}).stop_token_ids == (7, 2, 3)
    assert make({"stop_token_ids": "[7]", "ignore_eos": "True"}).stop_token_ids == (7,)
    assert make({"end_id": 9}).stop_token_ids == (9,)
    assert make({"end_id": -1}).stop_token_ids == ()


def test_stop_may_look_like_a_list():
    assert make({"stop": "[1]"}).stop == ("[1]",)
    assert make({"stop": "[INST]"}).stop == ("[INST]",)


def test_bad_words():
    ids = {"cat": [10], " cat": [11], "tomcat": [12, 10], " tomcat": [13, 14, 10]}
    words = make({"bad_words": ["cat", " tomcat", [5, 6]]}, encode=ids.__getitem__).bad_words
    assert words == ((10,), (11,), (12, 10), (5, 6))
    assert make({"bad_words": ["cat", "tomcat"]}, encode=ids.__getitem__).waits_for_token
    with pytest.raises(Refusal, match="need a tokenizer"):
        make({"bad_words": "cat"})


@pytest.mark.parametrize(
    "values, words",
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range: it must be from 0"),
        ({"temperature": "hot"}, "is not a number"),
        ({"temperature": float("nan")}, "is not a number"),
        ({"top_p": 0}, "above 0 and at most 1"),
        ({"top_k": 1.5}, "whole number"),
        ({"n": 0}, "from 1 to 128"),
        ({"max_tokens": True}, "whole number"),
        ({"max_tokens": 0}, "out of range"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens=9 exceeds the 5"),
        ({"min_tokens": 95}, "exceeds the 90 tokens"),
        ({"temperature": 10**400}, "not a number"),
        ({"beam_width": 4}, "not supported"),
        ({"ignore_eos": "maybe"}, "not a boolean"),
        ({"stop": 5}, "stop holds 5"),
        ({"stop_token_ids": [1000]}, "names token 1000"),
        ({"logit_bias": [1]}, "not a map"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"seed": 2**64}, "out of range"),
        ({"max_tokens": 5, "max_new_tokens": 6}, "max_tokens and max_new_tokens disagree"),
    ],
)
def test_refusals(values, words):
    with pytest.raises(Refusal, match=words) as refused:
        make(values)
    assert refused.value.kind == "invalid"


def test_no_room():
    with pytest.raises(Refusal, match="no room is left"):
        make(prompt_len=100)
