"""The reference sampler: what each option does to a distribution, and the same with NumPy as without."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.plugin import GenerationFailed, Sampler, SamplingParams

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "temperature": 1.0}


def drawn(logits: Sequence[float], prompt: Sequence[int] = (), **options: float) -> set[int]:
    """Return the tokens that come up in three hundred draws."""
    sampling = SamplingParams(**{**OFF, **options})  # type: ignore[arg-type]  # top_k is whole
    return {
        Sampler(SamplingParams(**{**OFF, **options, "seed": seed}), prompt).choose(logits)  # type: ignore[arg-type]
        for seed in range(300 if sampling.temperature else 1)
    }


def test_temperature_0_is_the_likeliest_and_of_equal_ones_the_first() -> None:
    assert drawn([0.0, 3.0, 3.0, 1.0], temperature=0) == {1}


def test_top_k_keeps_so_many() -> None:
    assert drawn([1.0, 1.1, 1.2, 1.3], top_k=2) == {2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = [math.log(share) for share in (0.5, 0.3, 0.2)]
    assert drawn(logits, top_p=0.5) == {0}
    assert drawn(logits, top_p=0.51) == {0, 1}
    assert drawn(logits, top_p=0.81) == {0, 1, 2}


def test_min_p_drops_what_is_less_likely_than_a_share_of_the_likeliest() -> None:
    logits = [math.log(share) for share in (0.5, 0.3, 0.2)]
    assert drawn(logits, min_p=0.59) == {0, 1}
    assert drawn(logits, min_p=0.61) == {0}


def test_the_filters_act_before_the_temperature() -> None:
    logits = [math.log(share) for share in (0.9, 0.07, 0.03)]
    assert drawn(logits, top_p=0.95, temperature=10) == {0, 1}


def test_a_penalty_divides_what_is_above_0_and_multiplies_what_is_below() -> None:
    assert drawn([2.0, 1.5], prompt=[0], repeat_penalty=2.0, temperature=0) == {1}
    assert drawn([-1.0, -1.5], prompt=[0], repeat_penalty=2.0, temperature=0) == {1}
    assert drawn([2.0, 1.5], prompt=[0, *[1] * 64], repeat_penalty=2.0, temperature=0) == {0}, "64 tokens back"


def test_a_token_that_was_chosen_counts_for_the_penalty() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2.0), ())
    assert [sampler.choose([2.0, 1.5]) for _ in range(2)] == [0, 1]


def test_draws_follow_the_distribution() -> None:
    logits = [math.log(share) for share in (0.6, 0.3, 0.1)]
    sampler = Sampler(SamplingParams(**OFF, seed=1), ())  # type: ignore[arg-type]
    counts = collections.Counter(sampler.choose(logits) for _ in range(5000))
    assert [round(counts[token] / 5000, 1) for token in range(3)] == [0.6, 0.3, 0.1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_60_logits_that_are_no_numbers_are_an_error_and_no_token(bad: float, temperature: float) -> None:
    logits = [bad] * 3 if bad == -math.inf else [0.0, bad, 1.0]
    for form in (logits, np.array(logits, dtype=np.float32)):
        with pytest.raises(GenerationFailed, match="NaN or infinite"):
            Sampler(SamplingParams(temperature=temperature), ()).choose(form)


@given(
    LOGITS,
    st.lists(st.integers(0, 45), max_size=70),
    st.integers(0, 2**32 - 1),
    st.integers(0, 45),
    st.floats(0.01, 1),
    st.floats(0, 0.99),
    st.floats(0.1, 10),
    st.floats(0, 3),
)
def test_numpy_changes_nothing(  # noqa: PLR0913, PLR0917 - every option
    logits: list[float],
    prompt: list[int],
    seed: int,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    temperature: float,
) -> None:
    sampling = SamplingParams(
        seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, temperature=temperature
    )
    plain, quick = Sampler(sampling, prompt), Sampler(sampling, prompt)
    array = np.array(logits, dtype=np.float64)
    assert [plain.choose(logits) for _ in range(5)] == [quick.choose(array) for _ in range(5)]


def test_the_highest_seed_means_the_same_as_0() -> None:
    logits = [0.0] * 50
    texts = [
        [sampler.choose(logits) for _ in range(10)]
        for sampler in (Sampler(SamplingParams(seed=seed, top_k=0), ()) for seed in (0, 2**32 - 1, 1))
    ]
    assert texts[0] == texts[1] != texts[2]
