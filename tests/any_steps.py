"""Steps by the dozen, as a front might ask for them: prompts of any length amid decodes, with drafts or without, sampled in every way. What
their tokens are is of no account."""

from __future__ import annotations

import random
from collections.abc import Iterator

from trireme.core.request import Sampling
from trireme.core.settings import Settings
from trireme.core.step import PAGE, Open, Regime, Step, ints


def any_steps(settings: Settings, num_steps: int, *, num_drafts: int, vocab_size: int, seed: int = 0) -> Iterator[Step]:
    """Of an epoch. Each slot has pages of its own, max_model_len tokens of them."""
    chance, max_len = random.Random(seed), settings.max_model_len
    assert max_len is not None
    num_pages = -(-max_len // PAGE)
    slots = range(min(settings.max_num_seqs, settings.num_pages // num_pages))
    writes = [(slot, index, slot * num_pages + index) for slot in slots for index in range(num_pages)]
    lens: dict[int, int] = {}  # of the sequence in a slot, as far as it was computed
    held: dict[int, int] = {}  # rows
    for number in range(num_steps):
        drafting = number % 3 == 0 and num_drafts > 0
        cp = 1 if drafting else settings.context_parallel_size  # items that hold rows stand in steps of decodes
        items, opens, left = [], [], settings.max_num_batched_tokens
        chosen = chance.sample(slots, chance.choice([1, 2, len(slots), chance.randint(1, len(slots))]))
        for slot in sorted(chosen, key=lambda slot: slot not in lens):  # decodes before prompts
            start = lens.get(slot, 0)
            if start + 1 + num_drafts >= max_len or chance.random() < 0.2:
                start = 0
            decodes = start > 0 and chance.random() < 0.9
            if not decodes and drafting and settings.context_parallel_size > 1:
                continue
            count = chance.choice([1, chance.randint(1, 16), chance.randint(1, 200)])  # a prompt, or what is left of one
            if decodes:
                drafts = sum(holds for *_, holds in items) < settings.mtp.max_batch_size and drafting
                count = 1 + drafts * (chance.randint(0, num_drafts) if number % 2 else num_drafts)
            count = min(count, left, max_len - start)
            if not count:
                break
            if not start:
                opens.append(Open(slot, any_sampling(chance, vocab_size), count, ints([3] * count)))
            left -= count
            holds = decodes and count > 1
            replays = chance.randint(0, held.get(slot, 0)) if decodes else 0
            items.append((slot, start, count, count if decodes else chance.randint(0, 1), replays, holds))
            lens[slot], held[slot] = start + (1 if decodes else count), count * holds
        if not items:
            continue
        named, starts, counts, samples, replays, holds = (list(column) for column in zip(*items, strict=True))
        regime = Regime.of(counts, settings.sp_from, 1 if all(starts) else cp)
        yield Step(
            0,
            number,
            ints(named),
            ints(starts),
            ints(counts),
            ints(samples),
            ints([chance.randrange(3, vocab_size) for _ in range(sum(counts))]),
            opens=opens,
            page_writes=ints(writes),
            replays=ints([0] * len(items) if regime.cp else replays),
            holds=ints(holds),
            nexts=ints([5] * len(items)),
            drafts=chance.randint(0, num_drafts) if any(samples) else 0,
            sp=regime.sp,
            cp=regime.cp,
        )
        writes = []


def any_sampling(chance: random.Random, vocab_size: int) -> Sampling:
    filters = {
        "top_k": chance.choice([0, 0, 1, 15, 40, chance.randint(1, vocab_size)]),
        "top_p": chance.choice([1.0, 1.0, 0.9]),
        "min_p": chance.choice([0.0, 0.0, 0.05]),
    }
    changes = {"repetition_penalty": chance.choice([1.0, 1.2]), "logit_bias": {7: 1.0}, "bad_words": ((9,),)}
    return Sampling(
        max_tokens=99,
        temperature=chance.choice([0.0, 0.7, 1.0]),
        seed=chance.randrange(1 << 40),
        logprobs=chance.choice([None, None, 0, 5]),
        prompt_logprobs=chance.choice([None, None, None, 2]),
        **filters,
        **(changes if chance.random() < 0.3 else {}),
    )
