"""Why a request is turned down or given up, in words. Whether it is, the scheduler and the engine say."""

from __future__ import annotations

from trireme.core.refusal import Refusal
from trireme.core.request import Request
from trireme.core.settings import Limits
from trireme.engine.sequence import pages_of


def check_request(request: Request, limits: Limits) -> None:
    """Refusal for a request that could never run, whatever the load."""
    num_prompt = len(request.prompt)
    if not num_prompt:
        raise Refusal("the prompt has no tokens", why="there is nothing to continue", fix="send at least one token")
    if num_prompt >= limits.max_model_len:
        raise Refusal(
            f"the prompt has {num_prompt} tokens, max_model_len is {limits.max_model_len}",
            why="no room is left for an output token",
            fix="shorten the prompt, set truncate_prompt_tokens, or raise max_model_len",
        )
    num_tokens = min(num_prompt + request.sampling.max_tokens, limits.max_model_len)
    if pages_of(num_tokens - 1) > limits.num_pages:  # the last token is sampled but never computed
        raise Refusal(
            f"prompt and output of up to {num_tokens} tokens need {pages_of(num_tokens - 1)} pages, there are {limits.num_pages}",
            why="a sequence must fit to ever finish",
            fix="lower max_tokens, or raise kv_cache_memory_bytes",
        )


def queue_full(num_queued: int) -> Refusal:
    return Refusal(
        f"the queue is full: {num_queued} requests wait",
        why="max_queue_size bounds it",
        fix="send again later, or raise max_queue_size",
        kind="unavailable",
    )


def too_late(waited_s: float) -> Refusal:
    return Refusal(
        f"request ended at its deadline, {waited_s:.1f} s after it came",
        why="it did not finish in time",
        fix="give it more time or fewer tokens",
        kind="deadline",
    )


def no_longer_fits(num_pages: int) -> Refusal:
    return Refusal("the request no longer fits", why=f"{num_pages} pages are left after a repair", kind="unavailable")


def struck_out(num_strikes: int, error: Exception | None) -> Refusal:
    return Refusal(
        f"the request was given up: {num_strikes} times in a row its step failed",
        why=str(error),
        fix="see the log of the stage that failed",
        kind="internal",
    )
