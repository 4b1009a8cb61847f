"""Schedule: every collective that a stage makes in a step, in words, from a model that is built but has no numbers."""

from __future__ import annotations

import torch

from trireme.layers.block import Build
from trireme.models.registry import build_stage
from trireme.models.spec import Spec
from trireme.parallel.plan import Plan
from trireme_kernels.choose import Choices


def schedule_of(spec: Spec, plan: Plan, stage: int) -> list[str]:
    """For each regime its name, then a line for each block that needs collectives before it or inside, in their order."""
    nowhere = torch.device("meta")
    return build_stage(Build(spec, plan, stage, nowhere, torch.float32, Choices("cpu", torch.float32))).schedule()
