"""Muon: momentum whose every update of a matrix is made orthogonal before it is applied.

The optimiser of the layers' matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), in F32
because the CPUs at hand have no fast BF16, and free of any draw. Embeddings and norms stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration that drives singular values towards one."""


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with singular values near one, for each of ``[K, out, in]``."""
    wide = matrices.shape[1] < matrices.shape[2]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.mT


class Muon:
    """``matrices`` are pairs of a parameter ``[out, in]`` and the number of equal blocks stacked in it."""

    def __init__(self, matrices: Iterable[tuple[nn.Parameter, int]], momentum: float, decay: float) -> None:
        self._momentum, self._decay = momentum, decay
        self._entries = [(p, blocks, torch.zeros_like(p)) for p, blocks in matrices]

    def step(self, rate: float) -> None:
        """One update of every matrix from its gradient, with learning rate ``rate``."""
        with torch.no_grad():
            for parameter, blocks, velocity in self._entries:
                gradient = parameter.grad
                if gradient is None:
                    continue
                velocity.lerp_(gradient, 1 - self._momentum)
                ahead = gradient.lerp(velocity, self._momentum)
                stack = ahead.view(blocks, -1, ahead.shape[1])
                update = orthogonal(stack).reshape(parameter.shape)
                scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
                parameter.mul_(1 - rate * self._decay)
                parameter.add_(update, alpha=-rate * scale)
