"""Prefix reuse: a page's name is a digest of its tokens and of the name before it, so one name stands for a whole
prefix. No allocation here."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from trireme.core.step import PAGE
from trireme.engine.pages import Pages


def extend_names(names: list[bytes], log: array[int], num_pages: int) -> None:
    """Lengthen `names` to the first `num_pages` pages of a token log (int32), all full.

    Digests are cryptographic: a user must not be able to craft a prompt that meets another's pages.
    """
    assert num_pages * PAGE <= len(log), "only full pages have names"
    name = names[-1] if names else b""
    for index in range(len(names), num_pages):
        name = blake2b(name + log[index * PAGE : (index + 1) * PAGE].tobytes(), digest_size=16).digest()
        names.append(name)


def find_prefix(pages: Pages, names: list[bytes], log: array[int]) -> list[int]:
    """Pages of the longest known prefix of `log` that leaves at least one token to compute; extends `names` to the log."""
    extend_names(names, log, len(log) // PAGE)
    found = []
    for name in names[: (len(log) - 1) // PAGE]:
        page = pages.find(name)
        if page is None:
            break
        found.append(page)
    return found
