"""Arrays of any shape and kind, none of them a whole number of words, come out of one packed copy as they went in."""

from __future__ import annotations

import numpy as np
import torch

from trireme.ranks import staging


def test_arrays_of_every_shape_come_as_they_went(monkeypatch):
    """The way of a GPU, with host memory in the device's place."""
    arrays = [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.zeros((4, 0), np.int64),
        np.array([True, False, True]),
        np.arange(5, dtype=np.int32),
        np.arange(12, dtype=np.float32).reshape(2, 3, 2)[:, ::2],
        np.zeros(0, np.int64),
    ]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kind: empty(*shape, **kind))
    found = staging.upload(arrays, torch.device("meta"))
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(array.shape, torch.from_numpy(array.copy()).dtype) for array in arrays]
    packed = empty(4096, dtype=torch.uint8)
    starts = [0, 64, 64, 128, 192, 256]
    for place, array in zip(staging.unpack(packed, starts, arrays), arrays, strict=True):
        place.numpy()[...] = array
    for tensor, array in zip(staging.unpack(packed.clone(), starts, arrays), arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
