"""Expert maps, int32 [num_slots], the expert that each slot of a layer holds: which is the first, and what any must be. Which maps
are good is engine/placing's to say, and which slot a row goes to parallel/placement's."""

from __future__ import annotations

import numpy as np


def trivial_map(num_experts: int, num_slots: int) -> np.ndarray:
    """Experts in order, and again from the first: int32 [num_slots]."""
    return (np.arange(num_slots) % num_experts).astype(np.int32)


def is_legal(map: np.ndarray, num_experts: int, num_slots: int) -> bool:
    """Whether each slot holds an expert, and each expert has a slot."""
    return map.shape == (num_slots,) and np.array_equal(np.unique(map), np.arange(num_experts))
