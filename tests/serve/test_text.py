"""Text equals transformers' AutoTokenizer: tokens, chats, and text that appears token by token."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.tokenizers_for_tests import byte_level, save, sentence_piece
from trireme.core.refusal import Refusal
from trireme.serve.text import StopText, Text, TokenText

DEMO = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
PROMPTS = [
    "",
    " ",
    "The capital of France is",
    "  two  spaces ",
    "line\nline\n\n\ttab",
    "héllo wörld naïve café",
    "你好世界 こんにちは 😀👩‍👩‍👧‍👦",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a" * 500,
]
CHATS = [
    [{"role": "user", "content": "Hello there!"}],
    [
        {"role": "system", "content": "Be 你好."},
        {"role": "user", "content": "  Hi\n"},
        {"role": "assistant", "content": "😀"},
        {"role": "user", "content": "?"},
    ],
]


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece", "demo"])
def pair(request, tmp_path_factory):
    """(transformers' tokenizer, ours)"""
    from transformers import AutoTokenizer

    if request.param == "demo":
        if not (DEMO / "tokenizer.json").exists():
            pytest.skip("the demo model is not fetched")
        directory = DEMO
    else:
        directory = save(
            {"byte_level": byte_level, "sentence_piece": sentence_piece}[request.param](), tmp_path_factory.mktemp(request.param)
        )
    text = Text.read(directory)
    assert text is not None
    return AutoTokenizer.from_pretrained(directory), text


def stream(text: Text, tokens, prompt=(), size=1) -> list[str]:
    writer = TokenText(text, prompt=prompt)
    pieces = [writer.feed(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return [*pieces, writer.flush()]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_transformers(pair, prompt):
    theirs, ours = pair
    assert ours.encode(prompt) == theirs.encode(prompt)
    assert ours.encode(prompt, add_special_tokens=False) == theirs.encode(prompt, add_special_tokens=False)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_chat_template_equals_transformers(pair, chat, generation):
    theirs, ours = pair
    rendered = ours.render(chat, add_generation_prompt=generation)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    tokens = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=generation)
    assert ours.encode(rendered, add_special_tokens=False) == list(tokens["input_ids"])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_streamed_text_is_the_decoded_text(pair, prompt, size):
    theirs, ours = pair
    tokens = ours.encode(prompt, add_special_tokens=False)
    pieces = stream(ours, tokens, size=size)
    assert "".join(pieces) == theirs.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [Text(byte_level()), Text(sentence_piece())]


@settings(max_examples=150, deadline=None)
@given(said=st.text(min_size=1, max_size=40), size=st.integers(1, 4))
def test_any_unicode_streams_whole(texts, said, size):
    for text in texts:
        tokens = text.encode(said, add_special_tokens=False)
        pieces = stream(text, tokens, size=size)
        assert "".join(pieces) == text.decode(tokens)
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in said


def test_any_bytes_stream_to_what_they_decode_to():
    text, rng = Text(byte_level()), random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(5, 420) for _ in range(rng.randrange(1, 60))]
        assert "".join(stream(text, tokens, size=rng.randrange(1, 5))) == text.decode(tokens)


def test_leading_space_of_a_continuation_stays():
    tokenizer = sentence_piece()
    text = Text(tokenizer)
    answer = [tokenizer.token_to_id(piece) for piece in ("▁", "i", "s", "▁", "P")]
    assert text.decode(answer) == "is P"
    assert "".join(stream(text, answer, prompt=text.encode("the capital"))) == " is P"


def test_no_piece_ends_inside_a_character():
    text = Text(byte_level())
    tokens = text.encode("ok 🎉 ok", add_special_tokens=False)  # the emoji is four tokens
    pieces = stream(text, tokens)
    assert "".join(pieces) == "ok 🎉 ok"
    assert any("🎉" in piece for piece in pieces)


def test_special_tokens_are_left_out_on_demand():
    text = Text(byte_level())
    tokens = text.encode("hi<|im_end|>")
    shown = TokenText(text, skip_special_tokens=False)
    assert shown.feed(tokens) == "hi<|im_end|>"
    assert TokenText(text).feed(tokens) in ("hi", "hi<|im_end|>"[:2])


@given(
    said=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    include=st.booleans(),
)
def test_stop_strings_are_found_across_pieces(said, stops, cuts, include):
    matcher, out, found, at = StopText(stops, include=include), "", False, 0
    for cut in cuts * 30:
        piece, found = matcher.feed(said[at : at + cut])
        out, at = out + piece, at + cut
        assert said.startswith(out)
        if found or at >= len(said):
            break
    if not found:
        assert out + matcher.flush() == said[:at]
        assert not any(stop in said[:at] for stop in stops)
    else:
        assert any(out.endswith(stop) for stop in stops) if include else any(said.startswith(out + stop) for stop in stops)
        assert include or not any(stop in out for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back():
    matcher = StopText(["END"])
    assert matcher.feed("text E") == ("text ", False)
    assert matcher.feed("N") == ("", False)
    assert matcher.feed("X") == ("ENX", False)
    assert matcher.feed("EN") == ("", False)
    assert matcher.feed("D more") == ("", True)


def test_checkpoint_without_tokenizer(tmp_path):
    assert Text.read(tmp_path) is None


def test_chat_refusals(tmp_path):
    with pytest.raises(Refusal, match="no chat template"):
        Text(byte_level()).render(CHATS[0])
    save(byte_level(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = Text.read(tmp_path)
    assert text is not None
    with pytest.raises(Refusal, match="roles must alternate"):
        text.render(CHATS[0])
    for bad in ([], "hi", [1], {}):
        with pytest.raises(Refusal, match="bad messages"):
            text.render(bad)
    with pytest.raises(Refusal, match="roles must alternate"):  # a template's value may have any name
        text.render(CHATS[0], messages=5, self=6)


def test_template_features(tmp_path):
    """tojson without HTML escapes, loop controls, generation marks, tools, special tokens, named default."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{{ mood }}"
    )
    save(byte_level(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": template}, {"name": "other", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = Text.read(tmp_path)
    assert text is not None
    rendered = text.render([{"role": "user", "content": "<é>", "name": None}, {"role": "user", "content": "2"}], tools=[{"a": 1}], mood="!")
    assert rendered == '<s>{"role": "user", "content": "<é>"}[\n {\n  "a": 1\n }\n]!'


def test_what_cannot_be_a_prompt_is_refused_unread(tmp_path):
    """No text of as many characters is of so few tokens."""
    directory = save(byte_level(), tmp_path)
    longest = max(map(len, byte_level().get_vocab()))  # in which a byte is a character
    text = Text.read(directory, max_tokens=10)
    assert text is not None and len(text.encode("<|im_start|>" * 10)) == 10
    for encode in (text.encode, text.encode_word):
        with pytest.raises(Refusal, match=f"a text of {10 * longest + 1} characters is too long"):
            encode("a" * (10 * longest + 1))
    unbound = Text.read(directory)
    assert unbound is not None and len(unbound.encode("a" * 1000)) > 10
