"""Placing: which expert each slot of a MoE layer holds, chosen by the loads of its experts. Pure functions of one layer's numbers;
when a layer changes, and what that costs, is the balancer's matter.

Packing, copies and the policies `hierarchical` and `global` follow DeepSeek's EPLB (github.com/deepseek-ai/EPLB; the worked example of
its README is a test), with stable sorts, and without the flaw that two copies of one expert may meet on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from trireme.core.maps import trivial_map
from trireme.core.refusal import Refusal

Policy = Literal["auto", "hierarchical", "global", "skew", "minimal"]

_TINY = 1e-5  # load of a rank that has none, so that a layer without rows counts as balanced
_NEAR = 0.95  # `minimal` stops at this part of the balance that `global` reaches: the rest would not be worth a move by itself
# The search from one map: changes at most, ranks that the busiest one trades with, part of the peak that a change must save for each
# expert received. More saves a few parts in a thousand of these windows, and nothing of the next ones.
_MOST_CHANGES, _LIGHTEST, _LEAST = 64, 3, 1e-4
_LATEST = 32  # windows that `skew` looks at one by one; with 16 it fits their noise


class Slots(NamedTuple):
    """The slots of one layer with experts. Each rank along ep has a run of them, all equally long."""

    num_experts: int
    num_slots: int
    num_ranks: int
    num_groups: int = 1  # of experts, where a router picks groups first
    num_nodes: int = 1  # hosts that the ranks are on

    @property
    def per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def nests(self) -> bool:
        """Whether each host can have whole groups, and then no rank two copies of one expert for want of others."""
        whole = self.num_groups % self.num_nodes == 0 and self.num_ranks % self.num_nodes == 0 and self.num_experts % self.num_groups == 0
        return whole and self.num_nodes * min(self.per_rank, self.num_experts) <= self.num_experts

    def check(self) -> None:
        """Refusal where no map has a slot for every expert and equally many on every rank."""
        if self.num_slots < self.num_experts:
            raise Refusal(
                f"{self.num_slots} slots for {self.num_experts} experts",
                why="each expert needs one",
                fix=f"give a layer at least {self.num_experts} slots",
            )
        if self.num_slots % self.num_ranks:
            over = -self.num_experts % self.num_ranks
            raise Refusal(
                f"{self.num_slots} slots on {self.num_ranks} ranks",
                why="each rank has equally many",
                fix=f"set num_redundant_experts to {over} plus a multiple of {self.num_ranks}",
            )


def trivial(slots: Slots) -> np.ndarray:
    """int32 [num_slots]: slot s holds expert s % num_experts."""
    return trivial_map(slots.num_experts, slots.num_slots)


def held(placed: np.ndarray, slots: Slots) -> np.ndarray:
    """int64 [num_ranks, num_experts]: how many copies of each expert a rank has under a map [num_slots]."""
    counts = np.zeros((slots.num_ranks, slots.num_experts), np.int64)
    np.add.at(counts, (np.arange(slots.num_slots) // slots.per_rank, placed), 1)
    return counts


def rank_loads(placed: np.ndarray, loads: np.ndarray, slots: Slots) -> np.ndarray:
    """Loads [..., num_experts] under one map [num_slots] -> [..., num_ranks], where copies share an expert's load equally."""
    counts = held(placed, slots)
    return loads / counts.sum(axis=0) @ counts.T


def balance(placed: np.ndarray, loads: np.ndarray, slots: Slots) -> float:
    """Maps [layers, num_slots] (or one), loads [layers, num_experts] (or one) -> mean over layers of mean rank load / max rank load:
    1 where all ranks have as much, 1 / num_ranks where one has all."""
    each = [rank_loads(map_, load, slots) for map_, load in zip(np.atleast_2d(placed), np.atleast_2d(loads), strict=True)]
    return float(np.mean([(load.mean() + _TINY) / (load.max() + _TINY) for load in each]))


def peak(placed: np.ndarray, windows: np.ndarray, slots: Slots) -> float:
    """Rows that the busiest rank has, summed over windows [W, num_experts]: ranks wait for it in each, so the mean does not say it."""
    return float(rank_loads(placed, np.atleast_2d(windows), slots).max(axis=-1).sum())


def busy_s(placed: np.ndarray, windows: np.ndarray, num_steps: np.ndarray, slots: Slots, row_s: float, read_s: float) -> float:
    """Seconds of the busiest rank, by whichever takes longer, its rows or the weights that it reads for them, summed over windows
    [W, num_experts] of so many steps each [W]: a row through an expert takes row_s, and reading an expert once read_s. A slot is read
    in a step that has rows for it: of n rows a step on the mean, 1 - exp(-n) of all steps.

    Two ranks of two slots, loads [30, 10, 10, 10] of one step, row_s 1, read_s 2: rank 0 has 40 rows; with read_s 50 all read two slots.
    """
    windows = np.atleast_2d(windows)
    num_steps, has = np.maximum(num_steps, 1)[:, None], held(placed, slots)
    shares = windows / has.sum(axis=0)
    reads = num_steps * -np.expm1(-shares / num_steps)
    return float(np.maximum(row_s * (shares @ has.T), read_s * (reads @ has.T)).max(axis=-1).sum())


def place(policy: Policy, windows: np.ndarray, slots: Slots, current: np.ndarray | None = None) -> np.ndarray:
    """Loads of recent windows [W, num_experts] -> int32 [num_slots], never worse than the trivial map, and as near to `current` as
    renaming ranks and slots can make it.

    auto: `hierarchical` where hosts get whole groups, else `minimal`.
    """
    slots.check()
    windows = np.atleast_2d(windows).astype(np.float64)
    current = trivial(slots) if current is None else current
    if policy == "auto":
        policy = "hierarchical" if slots.num_nodes > 1 and slots.nests else "minimal"
    loads = windows.sum(axis=0)
    if policy == "skew":
        found = place_for_windows(windows, slots)
    else:
        windows = loads[None]
        if policy == "hierarchical":
            found = place_hierarchically(loads, slots)
        elif policy == "global":
            found = place_globally(loads, slots)
        else:
            found = place_near(loads, slots, current)
    plain = trivial(slots)
    return settle(current, plain if peak(plain, windows, slots) < peak(found, windows, slots) else found, slots)


def place_hierarchically(loads: np.ndarray, slots: Slots) -> np.ndarray:
    """DeepSeek's policy for few hosts: loads [num_experts] -> int32 [num_slots]. Groups are packed onto hosts, experts copied inside
    a host, copies packed onto its ranks."""
    if not slots.nests:
        raise Refusal(
            f"{slots.num_experts} experts in {slots.num_groups} group(s) do not nest in {slots.num_nodes} host(s) of "
            f"{slots.num_ranks // slots.num_nodes} rank(s) with {slots.per_rank} slots",
            why="each host needs whole groups, and enough experts for its ranks to have no two copies of one",
            fix='use policy "global"',
        )
    group = slots.num_experts // slots.num_groups
    num_ranks = slots.num_ranks // slots.num_nodes
    found: list[int] = []
    for groups in pack(loads.reshape(slots.num_groups, group).sum(axis=1), slots.num_nodes, range(slots.num_groups)):
        experts = (np.array(groups)[:, None] * group + np.arange(group)).ravel()
        most = num_ranks if slots.per_rank <= len(experts) else slots.num_slots
        copies = replicate(loads[experts], slots.num_slots // slots.num_nodes, most)
        shares = loads[experts] / np.bincount(copies)
        for packed in pack(shares[copies], num_ranks, copies.tolist()):
            found.extend(experts[copies[packed]].tolist())
    return np.array(found, np.int32)


def place_globally(loads: np.ndarray, slots: Slots) -> np.ndarray:
    """DeepSeek's policy for many ranks: as if there were one group and one host."""
    return place_hierarchically(loads, slots._replace(num_groups=1, num_nodes=1))


def place_for_windows(windows: np.ndarray, slots: Slots) -> np.ndarray:
    """Loads [W, num_experts] -> int32 [num_slots] that makes the sum of the windows' peaks least, as far as the search goes: experts
    that are busy at the same time part, though the sum of the windows says nothing against them."""
    return _search(place_globally(windows.sum(axis=0), slots), windows[-_LATEST:], slots, enough=0.0)


def place_near(loads: np.ndarray, slots: Slots, current: np.ndarray) -> np.ndarray:
    """The map that a few changes of `current` [num_slots] lead to, each the one that saves most per expert that is received, until
    the balance is near that of `global`; where they do not lead there, the map of `global`."""
    fresh, plain = place_globally(loads, slots), trivial(slots)
    enough = min(peak(fresh, loads, slots) / _NEAR, peak(plain, loads, slots))
    near = _search(current, loads[None], slots, enough)
    return near if peak(near, loads, slots) <= enough and not _twins(near, slots) else fresh


def replicate(loads: np.ndarray, num_copies: int, most: int) -> np.ndarray:
    """Loads [n] -> the expert of each copy, int64 [num_copies]: each once, then one more of the expert whose copies have most each,
    the first of equals, at most `most` of one."""
    counts = np.ones(len(loads), np.int64)
    copies = list(range(len(loads)))
    while len(copies) < num_copies:
        expert = int(np.where(counts < most, loads / counts, -1.0).argmax())
        copies.append(expert)
        counts[expert] += 1
    return np.array(copies)


def pack(loads: np.ndarray, num_packs: int, names: Sequence[int]) -> list[list[int]]:
    """Items with loads [n] and names [n] -> the items of each pack, n / num_packs in each. The heaviest first, each goes to the
    lightest pack that has room and no item of its name.

    Where all packs with room have its name, a full pack without it gives one of its items away for it: among the packs that lack
    the name there is one as long as no name is there more often than packs.
    """
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    inside: list[set[int]] = [set() for _ in range(num_packs)]
    weights = [0.0] * num_packs

    def put(item: int, at: int) -> None:
        packs[at].append(item)
        inside[at].add(names[item])
        weights[at] += loads[item]

    for item in np.argsort(-loads, kind="stable").tolist():
        free = [at for at in range(num_packs) if len(packs[at]) < room]
        apart = [at for at in free if names[item] not in inside[at]]
        trades = [
            (max(weights[full] - loads[other] + loads[item], weights[at] + loads[other]), full, other, at)
            for full in (range(num_packs) if not apart else ())
            if names[item] not in inside[full]
            for other in packs[full]
            for at in free
            if names[other] not in inside[at]
        ]
        if apart or not trades:
            put(item, min(apart or free, key=weights.__getitem__))
            continue
        _, full, other, at = min(trades)
        packs[full].remove(other)
        inside[full].remove(names[other])
        weights[full] -= loads[other]
        put(other, at)
        put(item, full)
    return packs


def settle(current: np.ndarray, found: np.ndarray, slots: Slots) -> np.ndarray:
    """The map `found` with ranks of a host and slots of a rank renamed such that fewer slots differ from `current`: what a rank is
    to have goes to the one that has most of it (pairs with most in common first), and an expert stays in its slot.

    settle([0 1 | 2 3], [3 2 | 1 4]) -> [4 1 | 2 3]
    """
    old, new = held(current, slots), held(found, slots)
    common = np.minimum(old[:, None], new[None]).sum(axis=-1)  # [rank as it is, rank as found]
    hosts = np.arange(slots.num_ranks) // max(1, slots.num_ranks // slots.num_nodes)
    common[hosts[:, None] != hosts] = -1
    source = np.zeros(slots.num_ranks, np.int64)
    for _ in range(slots.num_ranks):
        rank, taken = np.unravel_index(common.argmax(), common.shape)
        source[rank] = taken
        common[rank], common[:, taken] = -2, -2
    settled = np.empty(slots.num_slots, np.int32)
    for rank, taken in enumerate(source):
        mine = current[rank * slots.per_rank : (rank + 1) * slots.per_rank]
        settled[rank * slots.per_rank : (rank + 1) * slots.per_rank] = _in_place(mine, found[taken * slots.per_rank :][: slots.per_rank])
    return settled


def received(old: np.ndarray, new: np.ndarray, slots: Slots) -> np.ndarray:
    """int64 [num_ranks]: experts that each rank must get from another one, from a map [num_slots] to a new one."""
    return ((held(new, slots) > 0) & (held(old, slots) == 0)).sum(axis=1)


def _in_place(has: np.ndarray, wants: np.ndarray) -> np.ndarray:
    """`wants` in an order such that what a rank has already stays in its slot."""
    left = wants.tolist()
    stays = []
    for expert in has.tolist():
        stays.append(expert in left)
        if stays[-1]:
            left.remove(expert)
    return np.array([expert if stay else left.pop(0) for expert, stay in zip(has.tolist(), stays, strict=True)])


def _twins(placed: np.ndarray, slots: Slots) -> bool:
    """Whether a rank has two copies of an expert while it need not."""
    return slots.per_rank <= slots.num_experts and bool(held(placed, slots).max() > 1)


class _Change(NamedTuple):
    """One step of the search: slots and the experts that they get."""

    rate: float  # what it saves (see _norm) for each expert received
    experts: dict[int, int]


def _norm(loads: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Loads [W, ..., num_ranks] and a scale of theirs [W] -> [W, ...]: the 16-norm, which is nearly the maximum but falls also where
    one of two equally busy ranks is relieved."""
    powers = loads / scale.reshape(-1, *[1] * (loads.ndim - 1))
    for _ in range(4):
        np.square(powers, out=powers)
    return scale.reshape(-1, *[1] * (loads.ndim - 2)) * np.sqrt(np.sqrt(np.sqrt(np.sqrt(powers.sum(axis=-1)))))


def _search(placed: np.ndarray, windows: np.ndarray, slots: Slots, enough: float) -> np.ndarray:
    """Changes slots of a map, each time those that save most per expert received, until the peak over windows [W, num_experts] is
    `enough` or nothing saves. The busiest rank trades a slot with another rank, or an expert of one of the two gets a copy on the
    other in place of an expert that has several."""
    placed = placed.copy()
    for _ in range(_MOST_CHANGES):
        loads = rank_loads(placed, windows, slots)
        total = loads.max(axis=-1).sum()
        if total <= enough:
            break
        busiest = int(np.bincount(loads.argmax(axis=-1), loads.max(axis=-1)).argmax())
        others = [rank for rank in loads.sum(axis=0).argsort(kind="stable").tolist() if rank != busiest][:_LIGHTEST]
        changes = [
            change
            for other in others
            for change in (
                _trade(placed, windows, slots, loads, busiest, other),
                _copy(placed, windows, slots, loads, busiest, other),
                _copy(placed, windows, slots, loads, other, busiest),
            )
        ]
        best = max(changes, key=lambda change: change.rate, default=_Change(0.0, {}))
        if best.rate <= _LEAST * total:
            break
        for slot, expert in best.experts.items():
            placed[slot] = expert
    return placed


def _trade(placed: np.ndarray, windows: np.ndarray, slots: Slots, loads: np.ndarray, one: int, other: int) -> _Change:
    """The best exchange of a slot of rank `one` for a slot of rank `other`; loads [W, num_ranks] are those now."""
    n = slots.per_rank
    mine, theirs = placed[one * n : (one + 1) * n], placed[other * n : (other + 1) * n]
    shares = windows / np.bincount(placed, minlength=slots.num_experts)
    given = shares[:, mine, None] - shares[:, None, theirs]  # [W, n, n]
    rest = _norm(np.delete(loads, [one, other], axis=1), scale := loads.max(axis=-1) + _TINY)
    pair = np.stack([loads[:, one, None, None] - given, loads[:, other, None, None] + given, rest[:, None, None] + 0 * given], axis=-1)
    saved = _norm(loads, scale).sum() - _norm(pair, scale).sum(axis=0)
    saved[np.isin(mine, theirs)] = -np.inf
    saved[:, np.isin(theirs, mine)] = -np.inf
    i, j = np.unravel_index(saved.argmax(), saved.shape)
    return _Change(float(saved[i, j]) / 2, {one * n + int(i): int(theirs[j]), other * n + int(j): int(mine[i])})


def _copy(placed: np.ndarray, windows: np.ndarray, slots: Slots, loads: np.ndarray, source: int, target: int) -> _Change:
    """The best new copy, on rank `target`, of an expert of rank `source`, in place of an expert that has other copies."""
    n, counts = slots.per_rank, np.bincount(placed, minlength=slots.num_experts)
    there = placed[target * n : (target + 1) * n]
    gone = np.array([slot for slot in range(target * n, (target + 1) * n) if counts[placed[slot]] > 1], np.int64)
    come = np.setdiff1d(placed[source * n : (source + 1) * n], there)
    if not len(gone) or not len(come):
        return _Change(0.0, {})
    has, at = held(placed, slots), np.arange(slots.num_ranks) == target
    leaves = placed[gone]
    shares = windows / counts
    fewer, more = windows[:, leaves] / (counts[leaves] - 1), windows[:, come] / (counts[come] + 1)  # [W, gone], [W, come]
    lost = (fewer - shares[:, leaves])[..., None] * has[:, leaves].T - fewer[..., None] * at  # [W, gone, num_ranks]
    won = (more - shares[:, come])[..., None] * has[:, come].T + more[..., None] * at  # [W, come, num_ranks]
    scale = loads.max(axis=-1) + _TINY
    saved = _norm(loads, scale).sum() - _norm(loads[:, None, None] + lost[:, :, None] + won[:, None], scale).sum(axis=0)
    i, j = np.unravel_index(saved.argmax(), saved.shape)
    return _Change(float(saved[i, j]), {int(gone[i]): int(come[j])})
