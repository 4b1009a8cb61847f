"""Sequence: one of a request's n answers as the scheduler keeps it; Group: the request they belong to. No decisions here."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from trireme.core.request import Logprobs, Request, Sampling
from trireme.core.step import PAGE
from trireme.engine.routed import RoutedRows


def pages_of(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE)


class State(Enum):
    HELD = "held"  # until its request's first sequence has computed the prompt they share
    WAITING = "waiting"  # in the queue, with no slot and no page
    RUNNING = "running"  # has a slot and pages
    LEAVING = "leaving"  # preempted: planned no more, and back to the queue when its last planned step has returned
    DONE = "done"  # ended; a slot it still has is given back when its last planned step has returned


@dataclass(eq=False)
class Group:
    """A request under way. It ends when all its sequences have ended."""

    request: Request
    arrived: float  # clock seconds
    order: int  # rises by one with each request
    sequences: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    queued: bool = True  # none of its sequences has run yet


class Sequence:
    """Prompt and output of one answer. `log` holds every token known; what is planned beyond it is in Slots."""

    __slots__ = (
        "emitted_at",
        "furthest",
        "furthest_at_strike",
        "group",
        "index",
        "limit",
        "log",
        "names",
        "num_cached",
        "num_named",
        "pages",
        "prompt_len",
        "prompt_logprobs",
        "rank",
        "routed",
        "sampling",
        "slot",
        "state",
        "stops",
        "strikes",
    )

    def __init__(self, group: Group, index: int, max_model_len: int):
        request = group.request
        sampling = request.sampling
        self.group = group
        self.index = index
        self.rank = (request.priority, group.order, index)  # the smallest goes first and is preempted last
        self.sampling: Sampling = msgspec.structs.replace(
            sampling,
            n=1,
            seed=(sampling.seed + index) & (1 << 63) - 1,
            stop=(),  # text is not for the ranks
            prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,  # one prompt, asked once
        )
        self.stops = frozenset(sampling.stop_token_ids)
        self.prompt_len = len(request.prompt)
        self.limit = min(self.prompt_len + sampling.max_tokens, max_model_len)  # tokens of prompt and output at the most
        self.log = array("i", request.prompt)
        self.state = State.WAITING
        self.slot = -1
        self.pages: list[int] = []
        self.names: list[bytes] = []  # of the log's full pages, as far as computed
        self.num_named = 0  # pages of this residence that reuse can see
        self.num_cached: int | None = None  # prompt tokens reused when it first ran
        self.prompt_logprobs: list[Logprobs | None] | None = None  # filled chunk by chunk, emitted with the first token
        if self.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in request.prompt]
        self.routed = RoutedRows() if request.routed_experts else None
        self.emitted_at = 0.0  # clock seconds of the last token
        self.furthest = 0  # tokens ever computed by a step that returned
        self.furthest_at_strike = -1
        self.strikes = 0  # epochs in a row that broke on a step with this sequence

    @property
    def num_output(self) -> int:
        return len(self.log) - self.prompt_len

    @property
    def reuses(self) -> bool:
        """Whether pages of others may stand in: not where every prompt row must give its logprobs, or its experts."""
        return self.sampling.prompt_logprobs is None and self.routed is None

    @property
    def drafts(self) -> bool:
        """Whether it may have drafts: what is sampled at a row must not depend on which tokens stand just before it, and prompt
        logprobs, as long as they are to come, are told with one token."""
        sampling = self.sampling
        return not (sampling.penalises or sampling.waits_for_token or sampling.prompt_logprobs is not None)

    @property
    def history(self) -> bytes:
        """The log as the sampler wants it on opening a slot."""
        return self.log.tobytes() if self.sampling.penalises or self.sampling.prompt_logprobs is not None else b""

    def banned(self) -> list[int]:
        """Tokens that would complete a bad word of several tokens now; matched over the output, as vLLM does."""
        return [
            word[-1]
            for word in self.sampling.bad_words
            if 1 < len(word) <= self.num_output + 1 and tuple(self.log[1 - len(word) :]) == tuple(word[:-1])
        ]

    def extend(self, tokens: list[int]) -> str | None:
        """Lengthen the log until a stop or the limit; why it ended. Of `tokens` only what the log took is left."""
        log = self.log
        for place, token in enumerate(tokens):
            if token in self.stops and self.num_output >= self.sampling.min_tokens:
                del tokens[place:]
                return "stop"
            log.append(token)
            if len(log) >= self.limit:
                del tokens[place + 1 :]
                return "length"
        return None
