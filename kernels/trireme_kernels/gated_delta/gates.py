"""The gates of the gated delta rule, from a block's projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gates(a: Tensor, b: Tensor, log_decay: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [N, Hv], log_decay (A_log), dt_bias float32 [Hv] -> (g, beta), float32 [N, Hv]: a row's log of decay, and how much
    of it is learnt."""
    return -log_decay.exp() * F.softplus(a.float() + dt_bias), torch.sigmoid(b.float())
