"""How the next token is chosen: pure functions over one row of logits, in llama.cpp's order.

Penalties, top-k, top-p, min-p, temperature, draw: the filters act on the distribution before the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tars_core.plugin import GREEDY_BELOW, PENALTY_WINDOW, GenerationFailed, SamplingParams

_LARGEST = torch.finfo(torch.float32).max


class Candidates(NamedTuple):
    """Tokens that may come next, the likeliest first, with their logits."""

    tokens: torch.Tensor
    logits: torch.Tensor


def choose(logits: torch.Tensor, last: Sequence[int], sampling: SamplingParams, generator: torch.Generator) -> int:
    """Return the next token. ``last`` are the tokens so far, prompt included; ``generator`` is one of the CPU."""
    logits = penalize(logits.float(), last, sampling.repeat_penalty)
    if sampling.temperature < GREEDY_BELOW:
        token = int(logits.argmax())
        if not bool(logits[token].isfinite()):
            raise _no_number()
        return token
    tokens, kept = candidates(logits, sampling)
    if not bool(kept[0].isfinite()):
        raise _no_number()
    # From the highest down, so that a tiny temperature divides nothing into infinity.
    shares = torch.softmax((kept - kept[0]) / sampling.temperature, dim=-1).cpu()
    return int(tokens[int(torch.multinomial(shares, 1, generator=generator))])


def penalize(logits: torch.Tensor, last: Sequence[int], penalty: float) -> torch.Tensor:
    """Make the tokens of the last 64 less likely: each once, however often it stands there."""
    recent = sorted(set(last[-PENALTY_WINDOW:]))
    if penalty == 1 or not recent:
        return logits
    at = torch.tensor(recent, device=logits.device)
    logits = logits.clone()
    chosen = logits[at]
    changed = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    logits[at] = changed.clamp(-_LARGEST, _LARGEST)  # a penalty of 1e-300 is 0 in this precision
    return logits


def candidates(logits: torch.Tensor, sampling: SamplingParams) -> Candidates:
    """Return what top-k, top-p and min-p leave over, one after the other; never nothing."""
    count = min(sampling.top_k or len(logits), len(logits))
    if count < len(logits):
        kept, tokens = logits.topk(count)
    else:
        kept, tokens = logits.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        shares = torch.softmax(kept, dim=-1).cumsum(dim=-1)
        # The token that reaches the sum belongs to the set.
        count = int((shares < sampling.top_p).sum()) + 1
        kept, tokens = kept[:count], tokens[:count]
    if sampling.min_p > 0:
        shares = torch.softmax(kept, dim=-1)
        count = max(1, int((shares >= sampling.min_p * shares[0]).sum()))
        kept, tokens = kept[:count], tokens[:count]
    return Candidates(tokens, kept)


def _no_number() -> GenerationFailed:
    return GenerationFailed(
        "the model computed no usable number", hint="the checkpoint is damaged, or too large for its number format"
    )
