"""Cutting a step's attention into dense groups of like lengths: index arithmetic on the CPU. No tensor is touched here.

Prompts are cut into blocks of QUERY_BLOCK queries, each an item of its own that needs no keys after its last query: a
chunk of 512 computes little more than the half of its square that is visible.

    keys    0 . . . . . . . . S          one chunk of 4 blocks after a prefix
    block 0 #######                      items of different kv length, so
    block 1 #########                    they may well land in different groups
    block 2 ###########
    block 3 #############
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trireme_kernels.paged_attention.op import PAGE

QUERY_BLOCK = 64  # smaller blocks see less they must not, larger ones multiply faster; 64 was best or next to it (CPU)
GROUP_BYTES = 4 << 20  # of gathered keys, values and scores: what is gathered should still be in cache when it is used


class Cost(NamedTuple):
    """Bytes that a group handles."""

    key_bytes: int  # a key and its value, all heads
    score_bytes: int  # a query and a key, all heads


class Group(NamedTuple):
    """n items, padded to L queries and S keys. A padded query repeats its item's last one; padded pages its last page."""

    rows: np.ndarray  # int64 [n, L]: rows of q
    places: np.ndarray  # int64 [n, L]: each query's place among its item's keys here: it sees none after
    pages: np.ndarray  # int64 [n, ceil(S / PAGE)]
    num_keys: int  # S


def group(query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray, window: int, cost: Cost) -> list[Group]:
    """query_lens, kv_lens [B], page_table [B, P] -> groups that hold every query once, not counting padding."""
    item, row, count, end = cut_queries(query_lens, kv_lens, QUERY_BLOCK)
    # With a window an item's keys begin at the page that its first query still sees.
    first_page = np.maximum(end - count + 1 - window, 0) // PAGE if window else np.zeros_like(end)
    num_keys = end - first_page * PAGE
    last_page = (end - 1) // PAGE
    groups = []
    for members in _alike(count, num_keys, cost):
        query = np.minimum(np.arange(count[members].max()), count[members, None] - 1)
        longest = int(num_keys[members].max())
        page = np.minimum(first_page[members, None] + np.arange(-(-longest // PAGE)), last_page[members, None])
        groups.append(
            Group(
                rows=row[members, None] + query,
                places=(num_keys - count)[members, None] + query,
                pages=page_table[item[members, None], page].astype(np.int64),
                num_keys=longest,
            )
        )
    return groups


def cut_queries(query_lens: np.ndarray, kv_lens: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[B], [B] -> blocks of at most `most` queries: (item, first row in q, queries, kv length up to the last query),
    each int64 [blocks], in the order of q's rows."""
    query_lens, kv_lens = query_lens.astype(np.int64), kv_lens.astype(np.int64)
    num_blocks = -(-query_lens // most)
    item = np.repeat(np.arange(len(query_lens)), num_blocks)
    begin = (np.arange(len(item)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)) * most
    count = np.minimum(query_lens[item] - begin, most)
    row = (np.cumsum(query_lens) - query_lens)[item] + begin
    return item, row, count, (kv_lens - query_lens)[item] + begin + count


def _alike(count: np.ndarray, num_keys: np.ndarray, cost: Cost) -> list[np.ndarray]:
    """Indices of blocks that are computed together: queries within a power of two, keys within about a quarter (short
    ones more, since a group costs as much as some 100 keys), and no more than GROUP_BYTES in all, but at least one."""
    queries_key = np.ceil(np.log2(count)).astype(np.int64)
    keys_key = (3 * np.log2(1 + num_keys / 256)).astype(np.int64)
    order = np.lexsort((num_keys, keys_key, queries_key))
    size = (num_keys * (cost.key_bytes + count * cost.score_bytes))[order].tolist()
    unlike = (np.diff(queries_key[order], prepend=0) != 0) | (np.diff(keys_key[order], prepend=0) != 0)
    cuts, held = [], 0
    for place, (one, new) in enumerate(zip(size, unlike.tolist(), strict=True)):
        if place and (new or held + one > GROUP_BYTES):
            cuts.append(place)
            held = 0
        held += one
    return np.split(order, cuts) if len(order) else []
