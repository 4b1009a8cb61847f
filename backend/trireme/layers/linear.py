"""Linear: rows times a weight, in the form in which this device multiplies fastest. Gated: one half of the columns gates the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from trireme.layers.block import Build
from trireme.layers.param import Cut, Param, by_columns
from trireme.parallel.collectives import picked
from trireme.parallel.seam import Addend
from trireme.parallel.strips import Strips, joined

# oneDNN takes its fast path from here on; one row padded to four costs less than one row (measured, AVX-512, float32).
_MIN_PACKED_ROWS = 4

# Rows from which on a block's last product is left to the seam: fewer were not measured.
_MANY = 4096


class Linear(nn.Module):
    """x [T, in] -> [T, out].

    float32 weights on a CPU are packed for oneDNN once they are loaded. Against F.linear (MKL) that takes 0.6 of the time
    for one row, 0.5 for eight and 0.7 for 64 (a [3072, 576] weight on one core, 717 -> 416, 988 -> 540, 3626 -> 2400 us).
    """

    def __init__(
        self,
        build: Build,
        num_out: int,
        num_in: int,
        cut: Cut | None = None,
        *,
        bias: bool = False,
        tied: Param | None = None,
        parts: Sequence[slice] = (),  # see `parts`
    ):
        super().__init__()
        cuts = () if cut is None else (cut,)
        self.weight = Param(build, (num_out, num_in), *cuts) if tied is None else tied
        self.bias = Param(build, (num_out,), *(each for each in cuts if each.dim == 0)) if bias else None
        self._multiply = build.choices("linear", num_in=self.weight.shape[1], num_out=self.weight.shape[0])
        # where ranks give shares of a sum, one of them adds the bias
        self._adds_bias = cut is None or cut.dim == 0 or cut.axis is None or build.place(cut.axis)[0] == 0
        self._parts, self._shape = parts, tuple(self.weight.shape)
        self._any = partial(torch.zeros, dtype=build.dtype, device=build.device)
        # what decides, beside the number of rows, by which kernels it multiplies
        self.form = (type(self), self._shape, bias and self._adds_bias, *((part.start, part.stop) for part in parts))
        self._packed: torch.Tensor | None = None

    def prepare(self) -> None:
        """Once the weight is loaded. A packed weight stands in for the plain one, which is let go. oneDNN has no empty ones."""
        fits = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32 and self.weight.numel()
        if fits and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, None)
            del self.weight

    def joined(self, x: Strips) -> torch.Tensor:
        """Each strip's product once the strip is here, in one tensor of all rows."""
        if self._packed is not None or len(x.sizes) == 1:
            return joined([self(rows) for rows in x])
        columns = self.weight.t()  # strips are large, and so torch's to multiply
        whole = columns.new_empty(sum(x.sizes), columns.shape[1])
        for rows, out in zip(x, whole.split(x.sizes), strict=True):
            if self.bias is None or not self._adds_bias:
                torch.mm(rows, columns, out=out)
            else:
                torch.addmm(self.bias, rows, columns, out=out)
        return whole

    def parts(self, x: torch.Tensor, rows: Sequence[torch.Tensor | slice]) -> Iterator[torch.Tensor]:
        """Its parts, some columns of x [T, in] -> [T, out] each, and of each part some rows: each by a product of its own once it is asked
        for; of a packed weight by one for all."""
        if self._packed is not None:
            whole = self(x)
            yield from (picked(whole, some)[:, part] for some, part in zip(rows, self._parts, strict=True))
            return
        bias = self.bias if self._adds_bias else None
        for some, part in zip(rows, self._parts, strict=True):
            yield self._multiply(picked(x, some), self.weight[part], None if bias is None else bias[part], None)

    def multiply_any(self, num_rows: int, dtype: torch.dtype | None = None) -> None:
        """Each of its products, of rows that mean nothing."""
        rows = self._any(num_rows, self._shape[1])
        self(rows, dtype)
        for _ in self.parts(rows, [slice(None)] * len(self._parts)):
            pass

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Of x's dtype, or another."""
        bias = self.bias if self._adds_bias else None
        if self._packed is None:
            return self._multiply(x, self.weight, bias, dtype)
        assert dtype in (None, torch.float32), "what is packed is float32"
        num_rows = x.shape[0]
        if num_rows >= _MIN_PACKED_ROWS:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        padded = F.pad(x, (0, 0, 0, _MIN_PACKED_ROWS - num_rows))
        return torch.ops.mkldnn._linear_pointwise(padded, self._packed, bias, "none", [], "")[:num_rows]


class GatedLinear(Linear):
    """x [T, in] -> silu(gates) * ups [T, width], gates and ups being the halves of one product."""

    def __init__(self, build: Build, width: int, num_in: int, axis: str | None, *, bias: bool = False):
        super().__init__(build, 2 * width, num_in, by_columns(axis, width, width), bias=bias)
        width = self.weight.shape[0] // 2
        self._swiglu = build.choices("swiglu", num_in=self.weight.shape[1], intermediate=width)
        self._silu_mul = build.choices("silu_mul", intermediate=width)

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert dtype in (None, x.dtype), "a gate gives what it gets"
        if self._packed is not None:
            return self._silu_mul(super().forward(x))
        return self._swiglu(x, self.weight, self.bias)


class LastLinear(Linear):
    """A block's last product, x [T, in] -> [T, out]."""

    def for_seam(self, x: torch.Tensor) -> torch.Tensor | Addend:
        """With many rows adding to the residual, Qwen3-8B computes 1.5 % more prompt tokens a second (H100, 8192 rows)."""
        if len(x) < _MANY or self._packed is not None or self.bias is not None:
            return self(x)
        return Addend(x, self.weight.t())

    def multiply_any(self, num_rows: int, dtype: torch.dtype | None = None) -> None:
        super().multiply_any(num_rows, dtype)
        product = self.for_seam(self._any(num_rows, self._shape[1]))
        if isinstance(product, Addend):  # which may be another kernel of cuBLAS
            product.added_to(self._any(num_rows, self._shape[0]))
