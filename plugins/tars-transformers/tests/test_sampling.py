"""Sampling on made-up logits: which tokens are left, and which is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tars_core.plugin import PENALTY_WINDOW, GenerationFailed, SamplingParams
from tars_transformers.sampling import candidates, choose, penalize

# Whole numbers apart, so that no rounding decides.
distinct = st.lists(st.integers(-12, 12), min_size=1, max_size=20, unique=True).map(
    lambda logits: [float(logit) for logit in logits]
)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def _left(logits: Sequence[float], **narrow: float) -> list[int]:
    sampling = SamplingParams(**{**OFF, **narrow})  # type: ignore[arg-type]
    tokens: list[int] = candidates(torch.tensor(logits), sampling).tokens.tolist()
    return tokens


def _shares(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def _choose(logits: torch.Tensor, *, seed: int = 0, **sampling: float) -> int:
    params = SamplingParams(**{**OFF, **sampling})  # type: ignore[arg-type]
    return choose(logits, [], params, torch.Generator().manual_seed(seed))


@given(distinct, st.integers(0, 25))
def test_top_k_leaves_the_k_likeliest(logits: list[float], k: int) -> None:
    by_rank = sorted(range(len(logits)), key=lambda token: -logits[token])
    assert _left(logits, top_k=k) == by_rank[: k or None]


@given(distinct, st.floats(0.01, 0.99))
def test_top_p_leaves_the_smallest_set_that_reaches_the_sum(logits: list[float], p: float) -> None:
    left = _left(logits, top_p=p)
    shares = _shares(logits)
    assert sum(shares[token] for token in left) >= p - 1e-5
    assert sum(shares[token] for token in left[:-1]) < p + 1e-5
    assert min(shares[token] for token in left) >= max([s for t, s in enumerate(shares) if t not in left], default=0)


@given(distinct, st.floats(0.01, 0.99))
def test_min_p_leaves_what_reaches_a_share_of_the_likeliest(logits: list[float], p: float) -> None:
    shares = _shares(logits)
    left = set(_left(logits, min_p=p))
    assert {t for t, share in enumerate(shares) if share >= (p + 1e-4) * max(shares)} <= left
    assert left <= {t for t, share in enumerate(shares) if share >= (p - 1e-4) * max(shares)}


@given(distinct, st.integers(0, 25), st.floats(1e-9, 1), st.floats(0, 0.999))
def test_together_they_leave_what_each_leaves_of_the_one_before(
    logits: list[float], k: int, p: float, share: float
) -> None:
    left = _left(logits, top_k=k, top_p=p, min_p=share)
    one = _left(logits, top_k=k)
    two = [one[at] for at in _left([logits[token] for token in one], top_p=p)]
    three = [two[at] for at in _left([logits[token] for token in two], min_p=share)]
    assert left == three
    assert left


@given(distinct, st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_the_temperature_does_not_change_who_may_be_drawn(logits: list[float], temperature: float, seed: int) -> None:
    narrow = {"top_k": 5, "top_p": 0.8, "min_p": 0.05}
    assert _choose(torch.tensor(logits), seed=seed, temperature=temperature, **narrow) in _left(logits, **narrow)


@given(st.lists(st.integers(0, 9), max_size=100), st.floats(1.01, 3))
def test_the_penalty_takes_each_of_the_last_64_tokens_once(last: list[int], penalty: float) -> None:
    logits = [2.0, -2.0, 0.0, 5.0, -5.0, 1.0, -1.0, 3.0, -3.0, 4.0]
    recent = set(last[-PENALTY_WINDOW:])
    expected = [
        (logit / penalty if logit > 0 else logit * penalty) if token in recent else logit
        for token, logit in enumerate(logits)
    ]
    given_logits = torch.tensor(logits)
    assert penalize(given_logits, last, penalty).tolist() == pytest.approx(expected)
    assert given_logits.tolist() == logits


@given(distinct)
def test_a_temperature_of_zero_takes_the_likeliest(logits: list[float]) -> None:
    assert _choose(torch.tensor(logits), temperature=0) == logits.index(max(logits))


def test_draws_follow_the_distribution_and_repeat_with_the_seed() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    draws = [_choose(logits, seed=seed, temperature=1) for seed in range(2000)]
    assert draws == [_choose(logits, seed=seed, temperature=1) for seed in range(2000)]
    assert [draws.count(token) / 2000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_computed(kind: torch.dtype) -> None:
    assert _choose(torch.tensor([60000.0, 1.0, 2.0], dtype=kind), temperature=1e-5) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_no_number_is_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(GenerationFailed, match="no usable number"):
        _choose(torch.tensor([1.0, bad, 2.0]), temperature=temperature)
