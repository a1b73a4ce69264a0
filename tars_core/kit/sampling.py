"""How the next token is chosen: the reference, exactly as :class:`~tars_core.types.request.SamplingParams` says.

For backends whose engine gives logits and does not sample. In llama.cpp's order: penalty, top-k, top-p, min-p,
temperature, draw; the filters act on the distribution before the temperature. Plain Python; where the logits are a
NumPy array, the vocabulary is searched by NumPy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from tars_core.kit.seeds import engine_seed
from tars_core.types.errors import GenerationFailed
from tars_core.types.request import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits: TypeAlias = Sequence[float] | npt.NDArray[np.floating]

PENALTY_WINDOW = 64
"""Tokens that ``repeat_penalty`` looks at, the prompt's included."""
GREEDY_BELOW = 1e-6
"""A temperature at which nothing but the likeliest token is left; from 1e-35 on a division overflows."""


class Sampler:
    """Chooses the tokens of one answer.

    ``prompt`` counts for the penalty. The same seed and the same logits give the same tokens.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._recent = list(prompt[-PENALTY_WINDOW:])
        self._random = random.Random(engine_seed(sampling.seed))  # noqa: S311 - a seed is to be repeatable

    def choose(self, logits: Logits) -> int:
        """Return the next token, from one logit for each token of the vocabulary.

        Raises :class:`~tars_core.types.errors.GenerationFailed` where they are not numbers.
        """
        penalized = self._penalized(logits)
        greedy = self._sampling.temperature < GREEDY_BELOW
        candidates = _likeliest(logits, penalized, 1 if greedy else self._sampling.top_k)
        if not math.isfinite(candidates[0][0]):
            raise GenerationFailed("the model computed NaN or infinite logits", hint="its weights are damaged")
        token = candidates[0][1] if greedy else self._drawn(candidates)
        self._recent = [*self._recent[1 - PENALTY_WINDOW :], token]
        return token

    def _penalized(self, logits: Logits) -> dict[int, float]:
        """Return the logits that the penalty changes: each token counts once, however often it stands there."""
        penalty = self._sampling.repeat_penalty
        if penalty == 1:
            return {}
        recent = {token: float(logits[token]) for token in set(self._recent) if token < len(logits)}
        return {token: logit / penalty if logit > 0 else logit * penalty for token, logit in recent.items()}

    def _drawn(self, candidates: list[tuple[float, int]]) -> int:
        top = candidates[0][0]
        shares = _shares(logit - top for logit, _ in candidates)
        kept = len(shares)
        if self._sampling.top_p < 1:
            reached = 0.0
            for kept, share in enumerate(shares, start=1):  # noqa: B007 - the token that reaches it belongs to the set
                reached += share
                if reached >= self._sampling.top_p:
                    break
        if self._sampling.min_p > 0:
            kept = max(1, sum(share >= self._sampling.min_p * shares[0] for share in shares[:kept]))
        scaled = _shares((logit - top) / self._sampling.temperature for logit, _ in candidates[:kept])
        return self._random.choices([token for _, token in candidates[:kept]], weights=scaled)[0]


def _likeliest(logits: Logits, changed: dict[int, float], count: int) -> list[tuple[float, int]]:
    """Return the ``count`` likeliest tokens (0: all) with their logits, best first; of equal ones the lower id first.

    NaN comes first, so that it is seen.
    """
    tokens: Iterable[int] = range(len(logits))
    if count and not isinstance(logits, Sequence):
        tokens = _searched(logits, changed, count)
    pairs = [(changed.get(token, float(logits[token])), token) for token in tokens]
    pairs.sort(key=lambda pair: (0 if math.isnan(pair[0]) else 1, -pair[0], pair[1]))
    return pairs[: count or None]


def _searched(logits: npt.NDArray[np.floating], changed: dict[int, float], count: int) -> Iterable[int]:
    """Return a superset of the likeliest tokens: NumPy finds the least of them fifty times faster than a sort."""
    import numpy as np  # noqa: PLC0415 - imported already, by who made the array

    lowest = min(count + len(changed), len(logits))
    threshold = np.partition(logits, len(logits) - lowest)[len(logits) - lowest]
    found = np.flatnonzero(~(logits < threshold))  # NaN compares as neither
    return {*found.tolist(), *changed}


def _shares(logits: Iterable[float]) -> list[float]:
    """Return a softmax of logits of which the highest is 0."""
    powers = [math.exp(logit) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]
