"""Affine pieces: any number of ranks, and any cut of items into chunks, gives the rows, states and inputs that one rank has."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from threads import Boards, Traffic, on_every_rank
from trireme.parallel.affine import Scan, compose, corrected, nothing_done, widened, windows
from trireme.parallel.collectives import Collectives
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme.parallel.zigzag import rows_of, zigzag
from trireme_kernels.choose import Choices

HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 4, 3, 4
CHANNELS = HEADS * (2 * KEY_DIM + VALUE_DIM)
OPS = Choices("cpu", torch.float32)
WEIGHT = torch.randn(CHANNELS, KERNEL, generator=torch.Generator().manual_seed(0))


class Carried(NamedTuple):
    """What items begin with, or end with."""

    inputs: torch.Tensor  # [I, K - 1, C]
    states: torch.Tensor  # [I, H, Dk, Dv]


class Rows(NamedTuple):
    """A layer's rows before the convolution, with their gates."""

    qkv: torch.Tensor  # [N, C]
    decay: torch.Tensor  # [N, H], log
    beta: torch.Tensor  # [N, H]

    def of(self, rows: np.ndarray) -> Rows:
        return Rows(*(each[torch.from_numpy(rows)] for each in self))


def drawn(counts: list[int], seed: int = 1) -> tuple[Rows, Carried]:
    draw = torch.Generator().manual_seed(seed)
    num_rows, num_items = sum(counts), len(counts)
    rows = Rows(
        torch.randn(num_rows, CHANNELS, generator=draw),
        -0.1 * torch.rand(num_rows, HEADS, generator=draw),
        torch.rand(num_rows, HEADS, generator=draw),
    )
    states = torch.randn(num_items, HEADS, KEY_DIM, VALUE_DIM, generator=draw)
    return rows, Carried(torch.randn(num_items, KERNEL - 1, CHANNELS, generator=draw), states)


def mixed(rows: Rows, before: torch.Tensor, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values behind the convolution, [N, H, D] each."""
    conv = OPS("causal_conv", channels=CHANNELS)
    heads = conv.run(rows.qkv, before, WEIGHT, conv.plan(counts)).unflatten(1, (HEADS, 2 * KEY_DIM + VALUE_DIM))
    q, k, v = heads.split([KEY_DIM, KEY_DIM, VALUE_DIM], dim=-1)
    return q, k, v


def ruled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, initial: torch.Tensor, counts: np.ndarray):
    """(results [N, H, v.shape[-1]], states after each item)."""
    rule = OPS("gated_delta", num_key_heads=HEADS, num_value_heads=HEADS, key_dim=KEY_DIM, value_dim=v.shape[-1])
    return rule.run(q, k, v, rows.decay, rows.beta, initial, rule.plan(counts))


def alone(rows: Rows, begin: Carried, counts: np.ndarray) -> tuple[torch.Tensor, Carried]:
    """One rank: (results, what items end with)."""
    results, states = ruled(*mixed(rows, begin.inputs, counts), rows, begin.states, counts)
    inputs = [torch.cat(run)[-(KERNEL - 1) :] for run in zip(begin.inputs, rows.qkv.split(counts.tolist()), strict=True)]
    return results, Carried(torch.stack(inputs), states)


def along_cp(rows: Rows, begin: Carried, counts: np.ndarray, cp: int) -> tuple[torch.Tensor, list[Carried], dict[int, Traffic]]:
    """The same on cp ranks, which share the rows: results in the order of the step, and what each rank ends with."""
    boards, plan = Boards(), Plan(layer_cut=(1,), cp=cp)
    scans = []
    for rank in range(cp):
        collectives = Collectives(Mesh(plan), rank)
        scans.append(Scan(collectives.along("cp")))
        collectives.begin(boards.groups(collectives))

    def run(rank: int) -> tuple[torch.Tensor, Carried]:
        scan, mine = scans[rank], rows.of(rows_of(zigzag(counts, cp, rank), counts))
        pieces = scan.plan(counts, KERNEL - 1, torch.from_numpy)
        lefts, inputs = scan.halo(mine.qkv, begin.inputs, pieces)
        q, k, v = mixed(mine, lefts, pieces.counts)
        nothing = nothing_done(len(pieces.counts), HEADS, KEY_DIM, VALUE_DIM, torch.device("cpu"))
        wide, done = ruled(q, k, widened(v, KEY_DIM), mine, nothing, pieces.counts)
        before, after = scan.states(done, begin.states)
        return corrected(wide, before, pieces.counts), Carried(inputs, after)

    parts = on_every_rank(cp, run, boards)
    results = torch.empty(len(rows.qkv), HEADS, VALUE_DIM)
    for rank, (part, _) in enumerate(parts):
        results[torch.from_numpy(rows_of(zigzag(counts, cp, rank), counts))] = part
    return results, [end for _, end in parts], boards.traffic


def test_the_picture_of_the_docstring():
    kept = np.array(list("xyz..a..b..c.de"))
    assert ["".join(each) for each in kept[windows(np.array([5]), 2, 3)][0]] == ["xyz", "yza", "zab", "abc", "cde"]


def test_windows_of_several_items():
    """Items of 1 and 9 rows beside each other; the first has one chunk that is not empty, of which there are four."""
    kept = np.array(list("xypq..ab..cd..ef.Ahi"))  # [part, item, window]
    found = kept[windows(np.array([1, 9]), 2, 2)]
    assert ["".join(each) for each in found[0]] == ["xy", "xy", "xy", "xy", "yA"]
    assert ["".join(each) for each in found[1]] == ["pq", "ab", "cd", "ef", "hi"]


def test_pieces_are_composed_in_order():
    """state -> 2 state + 1, then -> 3 state: 5 becomes 11 becomes 33. Nothing done in between changes nothing."""
    done = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 3.0]]]])
    assert compose(done, torch.tensor([[[5.0]]])).flatten().tolist() == [5, 11, 33]
    done = torch.cat((done[:1], nothing_done(1, 1, 1, 1, torch.device("cpu")), done[1:]))
    assert compose(done, torch.tensor([[[5.0]]])).flatten().tolist() == [5, 11, 11, 33]


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("lens", [[40], [17, 33, 8], [1], [3, 50, 1, 2], [5, 5], [2, 7]], ids=str)
def test_ranks_along_cp_do_what_one_does(cp: int, lens: list[int]):
    counts = np.array(lens, np.int32)
    rows, begin = drawn(lens)
    wanted, end = alone(rows, begin, counts)
    results, ends, _ = along_cp(rows, begin, counts, cp)
    torch.testing.assert_close(results, wanted, atol=1e-5, rtol=1e-4)
    for found in ends:
        assert torch.equal(found.inputs, end.inputs)
        torch.testing.assert_close(found.states, end.states, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.states, ends[0].states)  # ranks must not drift apart


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("cuts", [[[16, 9], [24, 3]], [[1, 30], [2, 1], [37, 8]]], ids=str)
def test_states_are_carried_from_step_to_step(cp: int, cuts: list[list[int]]):
    """Two prompts in chunks of any size give what they give whole."""
    totals = np.sum(cuts, axis=0)
    rows, begin = drawn(totals.tolist())
    wanted, end = alone(rows, begin, totals)
    firsts, done, found = np.cumsum(totals) - totals, np.zeros(2, int), torch.empty_like(wanted)
    for cut in cuts:
        at = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts + done, cut, strict=True)])
        found[torch.from_numpy(at)], [begin, *_], _ = along_cp(rows.of(at), begin, np.array(cut), cp)
        done += cut
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(begin.states, end.states, atol=1e-5, rtol=1e-4)
    assert torch.equal(begin.inputs, end.inputs)


def test_what_is_sent_does_not_grow_with_the_sequence():
    """Two chunks of each item to three other ranks: the inputs that a convolution sees, and M and U."""
    sent = []
    for length in (40, 400):
        rows, begin = drawn([length, 7])
        traffic = along_cp(rows, begin, np.array([length, 7]), 4)[2]
        assert all(each.calls == ["all_gather cp"] * 2 for each in traffic.values())
        sent.append({each.num_bytes for each in traffic.values()})
    item = 4 * ((KERNEL - 1) * CHANNELS + HEADS * KEY_DIM * (KEY_DIM + VALUE_DIM))
    assert sent == [{3 * 2 * 2 * item}] * 2


def test_results_keep_their_dtype():
    wide = torch.randn(5, HEADS, VALUE_DIM + KEY_DIM).bfloat16()
    states = torch.randn(2, HEADS, KEY_DIM, VALUE_DIM)
    found = corrected(wide, states, np.array([5, 0]))
    wanted = wide[..., :VALUE_DIM].float() + torch.einsum("nhk,hkv->nhv", wide[..., VALUE_DIM:].float(), states[0])
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
