"""Blocks: how many a length is cut into, and how long they are. triton's own functions are made for kernels, and cost the host more."""

from __future__ import annotations


def cdiv(length: int, block: int) -> int:
    """How many blocks there are, the last one perhaps not full."""
    return -(-length // block)


def next_power_of_2(length: int) -> int:
    """The least that is no less than a length, which is above zero."""
    return 1 << (length - 1).bit_length()
