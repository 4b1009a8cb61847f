"""Answer: a request's emissions made into the outputs its user asked for. No server types, no threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Logprobs, Sampling
from trireme.serve.signature import Order
from trireme.serve.text import StopText, Text, TokenText

Values = list[Any] | np.ndarray  # of an output, flat


class Answer:
    """Takes emissions in order; `outputs` says what to send now.

    `prompt_text` comes first in text_output where the order wants an echo. Without `text` (a checkpoint that has no
    tokenizer) text_output is empty.
    """

    def __init__(self, order: Order, sampling: Sampling, prompt: Sequence[int], prompt_text: str, text: Text | None):
        self._order, self._text = order, text
        self._wanted = {*order.returns, *(["text_output"] if order.writes else [])}
        if sampling.n > 1:
            self._wanted |= {"index", "num_output_tokens"} if "output_ids" in order.returns else {"index"}
        self._num_input = len(prompt)
        self._prefix = prompt_text if order.echo else ""
        self._sequences = [_Sequence(index, order, sampling, prompt, text) for index in range(sampling.n)]
        self._prompt_logprobs: list[Logprobs | None] | None = None
        self.error: Exception | None = None  # it ended so; nothing more is to be sent but this

    @property
    def done(self) -> bool:
        return self.error is not None or all(sequence.finish for sequence in self._sequences)

    def take(self, emission: Emission) -> bool:
        """Whether a stop string in the text ended the sequence: the engine does not know yet."""
        sequence = self._sequences[emission.index]
        if sequence.finish:
            return False
        if emission.finish_reason not in (None, "stop", "length"):
            self.error = emission.error or Refusal(f"the request ended: {emission.finish_reason}", kind="internal")
            return False
        if emission.prompt_logprobs is not None:
            self._prompt_logprobs = emission.prompt_logprobs
        sequence.take(emission)
        return sequence.finish is not None and emission.finish_reason is None

    def outputs(self) -> dict[str, Values] | None:
        """Values by output name for one response, or None while there is nothing to send."""
        if self._order.stream:
            fresh = [sequence for sequence in self._sequences if sequence.worth_sending()]
        else:
            fresh = self._sequences if self.done else []
        return self._gather(fresh) if fresh else None

    def _gather(self, sequences: Sequence[_Sequence]) -> dict[str, Values]:
        wanted = self._wanted
        values: dict[str, Values] = {name: [of(sequence) for sequence in sequences] for name, of in _EACH.items() if name in wanted}
        if self._prefix and "text_output" in wanted:
            values["text_output"] = [self._prefix + sequence.text for sequence in sequences]
        if "num_input_tokens" in wanted:
            values["num_input_tokens"] = [self._num_input]
        if "output_ids" in wanted:
            values["output_ids"] = [token for sequence in sequences for token in sequence.tokens]
        if "output_log_probs" in wanted:
            values["output_log_probs"] = [entry.value for sequence in sequences for entry in sequence.logprobs]
        if "logprobs" in wanted:
            values["logprobs"] = [self._json(sequence.logprobs) for sequence in sequences]
        if "routed_experts" in wanted and (ended := [sequence for sequence in sequences if sequence.ends]):
            values["routed_experts"] = np.concatenate([sequence.routed_experts() for sequence in ended])
        if self._prompt_logprobs is not None and "prompt_logprobs" in wanted:
            values["prompt_logprobs"] = [self._json(self._prompt_logprobs)]
            self._prompt_logprobs = None
        for sequence in sequences:
            sequence.sent()
        return values

    def _json(self, entries: Sequence[Logprobs | None]) -> str:
        """vLLM's schema: a list of {token id: {logprob, rank, decoded_token}}, the sampled token first."""
        return json.dumps([None if entry is None else self._alternatives(entry) for entry in entries])

    def _alternatives(self, entry: Logprobs) -> dict[int, dict[str, Any]]:
        ranked = [(entry.token, entry.value, entry.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(zip(entry.top_ids, entry.top_values, strict=True), 1)]
        found: dict[int, dict[str, Any]] = {}
        for token, value, rank in ranked:
            decoded = self._text.decode([token], skip_special_tokens=False) if self._text else None
            found.setdefault(token, {"logprob": value, "rank": rank, "decoded_token": decoded})
        return found


class _Sequence:
    """One of n answers: what is made and not sent yet."""

    def __init__(self, index: int, order: Order, sampling: Sampling, prompt: Sequence[int], text: Text | None):
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.cumulative = 0.0  # over what is sent, too
        self.finish: str | None = None
        self._num_input = len(prompt)
        self._routed: list[np.ndarray] = []  # int16 [rows, numbers of a row] each
        self._order, self._min_tokens = order, sampling.min_tokens
        writes = order.writes or sampling.stop
        self._writer = TokenText(text, prompt=prompt, skip_special_tokens=order.skip_special_tokens) if text and writes else None
        self._stops = StopText(sampling.stop, include=order.include_stop) if sampling.stop else None
        self._num_tokens = 0  # sent or not
        self._began = self._ended = False  # sent something; sent how it finished

    def take(self, emission: Emission) -> None:
        used, stopped = self._write(emission.tokens)
        self._num_tokens += used
        if emission.routed_experts is not None:
            self._routed.append(emission.routed_experts)
        self.tokens += emission.tokens[:used]
        if emission.logprobs:
            self.logprobs += emission.logprobs[:used]
            self.cumulative += sum(entry.value for entry in emission.logprobs[:used])
        self.finish = "stop" if stopped else emission.finish_reason
        if self.finish and not stopped and self._writer:
            self._finish_text()

    def _write(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """(tokens used, whether a stop string was found). Tokens behind the one that completes it are dropped."""
        if not self._writer:
            return len(tokens), False
        if not self._stops:
            self.text += self._writer.feed(tokens)
            return len(tokens), False
        for used, token in enumerate(tokens, 1):
            piece = self._writer.feed([token])
            if self._num_tokens + used <= self._min_tokens:  # a stop string may not end it yet
                self.text += piece
                continue
            out, found = self._stops.feed(piece)
            self.text += out
            if found:
                return used, True
        return len(tokens), False

    def _finish_text(self) -> None:
        """The sequence ended by itself: what was held back comes out."""
        assert self._writer is not None
        rest = self._writer.flush()
        if self._stops:
            rest, found = self._stops.feed(rest)
            self.finish = "stop" if found else self.finish
            rest += self._stops.flush()
        self.text += rest

    def worth_sending(self) -> bool:
        """Whether there is news for a stream. Not while text is held back: a first response without text would count as a token."""
        if (self.text and self._order.writes) or (self.tokens and "output_ids" in self._order.returns):
            return True
        return self.finish is not None and not self._ended and (not self._began or bool(self._order.returns))

    @property
    def ends(self) -> bool:
        """Whether the next response is its last."""
        return self.finish is not None and not self._ended

    def routed_experts(self) -> np.ndarray:
        """int16, flat: of each token of prompt and answer; -1 where it was not computed."""
        num_tokens = self._num_input + self._num_tokens
        rows = np.concatenate(self._routed)[:num_tokens]
        return np.pad(rows, ((0, num_tokens - len(rows)), (0, 0)), constant_values=-1).ravel()

    def sent(self) -> None:
        self.text, self.tokens, self.logprobs = "", [], []
        self._began, self._ended = True, self.finish is not None


_EACH: dict[str, Callable[[_Sequence], Any]] = {  # outputs with one value for each of n
    "text_output": lambda sequence: sequence.text,
    "finish_reason": lambda sequence: str(sequence.finish),
    "num_output_tokens": lambda sequence: len(sequence.tokens),
    "index": lambda sequence: sequence.index,
    "cumulative_logprob": lambda sequence: sequence.cumulative,
    "cum_log_probs": lambda sequence: sequence.cumulative,
}
