"""Text and tokens: a checkpoint's tokenizer, text that appears token by token, and stop strings. No server, no engine.

Through the `tokenizers` library alone: importing transformers imports torch, which a server's stub does not need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trireme.core.refusal import Refusal
from trireme.serve.chat import ChatTemplate

_HALF = "\ufffd"  # how a decoder shows bytes that are no whole character (yet)


class Text:
    """The tokenizer and chat template of one checkpoint; thread-safe. `max_tokens`: that a text may be of; None: any number."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None = None, max_tokens: int | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._chat = tokenizer, chat
        self._max_tokens, self._longest = max_tokens, max(map(len, tokenizer.get_vocab()))  # characters of a token

    @classmethod
    def read(cls, directory: Path, max_tokens: int | None = None) -> Text | None:
        """Of tokenizer.json, tokenizer_config.json and chat_template.jinja; None where there is no tokenizer.json."""
        path = directory / "tokenizer.json"
        if not path.exists():
            return None
        config = _read_json(directory / "tokenizer_config.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Refusal(f"{path} cannot be read", why=str(error), fix="fetch the checkpoint again") from None
        source = _template_source(directory, config)
        return cls(tokenizer, ChatTemplate(source, _special_tokens(config)) if source else None, max_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; equal to transformers' AutoTokenizer, whose rules for a prefix such as bos are in tokenizer.json. Refusal for a text
        that cannot be of so few tokens as it may: to find out how many takes a minute and a GiB for some MB (measured)."""
        if self._max_tokens is not None and len(text) > self._max_tokens * self._longest:
            raise Refusal(
                f"a text of {len(text)} characters is too long",
                why=f"at most {self._max_tokens} tokens fit, and none has more than {self._longest} characters",
                fix="shorten it, or raise max_model_len",
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_word(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def render(self, messages: Any, /, **values: Any) -> str:
        """Prompt text of chat messages; it holds the special tokens, so encode it without adding them."""
        if self._chat is None:
            raise Refusal(
                "this checkpoint has no chat template", why="messages need one", fix="send text_input, or add chat_template.jinja"
            )
        return self._chat.render(messages, **values)


class TokenText:
    """Text of a growing token sequence: what `feed` returns, joined, is the decoded sequence, and no piece ends inside a character.

    Decoding is not additive: bytes of one character may lie in several tokens, and SentencePiece drops the space in
    front of what it takes for a beginning. So a window is decoded, and what is new in it is taken:

        [ context: the piece before ][ pending tokens ]      context moves up when all pending text is whole
    """

    def __init__(self, text: Text, *, prompt: Sequence[int] = (), skip_special_tokens: bool = True):
        self._text, self._skip = text, skip_special_tokens
        self._window = list(prompt[-_CONTEXT:])
        self._pending = len(self._window)  # where the pending tokens begin
        self._sent = len(self._decode(self._window).rstrip(_HALF))  # characters of the window's text that are out

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens, skip_special_tokens=self._skip)

    def feed(self, tokens: Sequence[int]) -> str:
        """New whole characters; empty while the last one is incomplete."""
        self._window += tokens
        text = self._decode(self._window)
        whole = text.rstrip(_HALF)
        new = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(whole) == len(text):
            context = self._decode(self._window[self._pending :])
            if context:  # an empty one (special tokens) would make the next piece look like a beginning
                del self._window[: self._pending]
                self._sent = len(context)
            self._pending = len(self._window)
        return new

    def flush(self) -> str:
        """What was held back: the sequence has ended, and an incomplete character stays one."""
        rest = self._decode(self._window)[self._sent :]
        self._sent += len(rest)
        return rest


_CONTEXT = 5  # prompt tokens in front of the first output token


class StopText:
    """Finds stop strings in text that comes in pieces. The longest end that may begin one is held back."""

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops, self._include, self._held = tuple(stops), include, ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text to give out, whether a stop string ended it). The stop string is cut unless `include`."""
        held = self._held + piece
        found = min(((at, stop) for stop in self._stops if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            at, stop = found
            self._held = ""
            return held[: at + len(stop)] if self._include else held[:at], True
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or named templates with a default."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} of tokenizer_config.json, where a token is a string or {"content": string, ...}."""
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}
