"""Muon: momentum whose every update of a matrix is made orthogonal before it is applied.

The optimiser of the layers' matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), in F32
because the CPUs at hand have no fast BF16, and free of any draw. Embeddings and norms stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration that drives singular values towards one."""


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with singular values near one, for each of ``[K, out, in]``."""
    wide = matrices.shape[1] < matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """``matrices`` are pairs of a parameter ``[out, in]`` and the number of equal blocks stacked in it."""

    def __init__(self, matrices: Iterable[tuple[nn.Parameter, int]], lr: float, momentum: float, decay: float) -> None:
        groups = [{"params": [p], "blocks": blocks} for p, blocks in matrices]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """One update of every matrix; ``closure`` is not used."""
        del closure
        for group in self.param_groups:
            parameter = group["params"][0]
            state = self.state[parameter]
            if not state:
                state["velocity"] = torch.zeros_like(parameter)
            velocity: Tensor = state["velocity"]
            velocity.lerp_(parameter.grad, 1 - group["momentum"])
            ahead = parameter.grad.lerp(velocity, group["momentum"])
            blocks = ahead.view(group["blocks"], -1, ahead.shape[1])
            update = orthogonal(blocks).reshape(parameter.shape)
            scale = max(1.0, blocks.shape[1] / blocks.shape[2]) ** 0.5
            parameter.mul_(1 - group["lr"] * group["decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)
