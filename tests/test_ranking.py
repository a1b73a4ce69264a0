"""Which backend comes first, and what is said about it."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.planning.ranking import Key, Policy, rank
from tars_core.types.models import ModelRef
from tars_core.types.reports import ProbeReport

FIRST = ModelRef(scheme="path", rest="/m/phi.gguf")
SECOND = ModelRef(scheme="ollama", rest="phi")
THIRD = ModelRef(scheme="hf", rest="microsoft/phi-2")
FORMS = (FIRST, SECOND, THIRD)
GIB = 2**30


def report(**facts: object) -> ProbeReport:
    return ProbeReport(**{"available": True, "device": "cpu", "weights_id": "w", **facts})  # type: ignore[arg-type]


def policy(**wishes: object) -> Policy:
    return Policy(**{"models": FORMS, **wishes})  # type: ignore[arg-type]


def order(reports: Mapping[Key, ProbeReport], **wishes: object) -> list[str]:
    candidates, rejected = rank(reports, policy(**wishes))
    assert rejected == ()
    return [candidate.backend for candidate in candidates]


def one_form(**reports: ProbeReport) -> dict[Key, ProbeReport]:
    return {(name, FIRST): facts for name, facts in reports.items()}


def degraded(reports: Mapping[Key, ProbeReport], **wishes: object) -> dict[str, bool]:
    return {candidate.backend: candidate.degraded for candidate in rank(reports, policy(**wishes))[0]}


# ---- the order of the criteria: in each test a later criterion speaks for the other one ----------------------------


def test_where_all_is_equal_the_name_decides() -> None:
    assert order(one_form(b=report(), c=report(), a=report())) == ["a", "b", "c"]


def test_the_preference_comes_before_the_name() -> None:
    assert order(one_form(a=report(preference=40), b=report(preference=60))) == ["b", "a"]


def test_own_measured_speed_comes_before_the_preference() -> None:
    reports = one_form(a=report(preference=90), b=report(preference=10))
    assert order(reports, measured_tokens_per_s={("a", FIRST): 10.0, ("b", FIRST): 20.0}) == ["b", "a"]


def test_a_backend_never_measured_comes_after_the_measured_ones() -> None:
    reports = one_form(a=report(preference=90), b=report(preference=10))
    assert order(reports, measured_tokens_per_s={("b", FIRST): 0.5}) == ["b", "a"]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "metal", "vulkan"])
def test_a_real_device_comes_before_the_cpu_whatever_was_measured(device: str) -> None:
    reports = one_form(a=report(preference=90), b=report(preference=10, device=device))
    assert order(reports, measured_tokens_per_s={("a", FIRST): 50.0, ("b", FIRST): 5.0}) == ["b", "a"]


def test_a_backend_that_does_not_know_its_device_is_not_taken_for_a_fast_one() -> None:
    assert order(one_form(a=report(device=None), b=report(device="cuda"))) == ["b", "a"]


def test_the_users_order_of_forms_comes_before_a_real_device() -> None:
    reports = {
        ("a", SECOND): report(weights_id="v", device="cuda"),
        ("b", FIRST): report(weights_id="w"),
        ("c", THIRD): report(weights_id="u", device="cuda"),
    }
    assert order(reports) == ["b", "a", "c"]


def test_a_form_of_unknown_weights_keeps_its_place_among_the_forms() -> None:
    reports = {
        ("a", THIRD): report(weights_id="u"),
        ("b", SECOND): report(weights_id=None),
        ("c", FIRST): report(weights_id="w"),
    }
    assert order(reports) == ["c", "b", "a"]


def test_forms_with_equal_weights_count_as_the_first_of_them() -> None:
    reports = {("a", FIRST): report(), ("b", SECOND): report(weights_id="v"), ("c", THIRD): report(device="cuda")}
    assert order(reports) == ["c", "a", "b"]


def test_the_same_weights_as_the_best_come_before_an_earlier_form_with_others() -> None:
    reports = {
        ("a", SECOND): report(weights_id="v"),
        ("b", FIRST): report(weights_id="w"),
        ("c", SECOND): report(weights_id="v"),
    }
    assert order(reports) == ["b", "a", "c"]
    assert order(reports, order=("a",)) == ["a", "c", "b"]


def test_the_users_order_of_backends_comes_before_everything() -> None:
    reports = {
        ("a", FIRST): report(device="cuda", preference=100),
        ("b", SECOND): report(weights_id="v"),
        ("c", THIRD): report(weights_id=None, preference=0),
    }
    assert order(reports, order=("c", "b")) == ["c", "b", "a"]


def test_of_several_forms_one_backend_can_run_the_users_first_stands_first() -> None:
    reports = {("a", form): report(weights_id=None) for form in reversed(FORMS)}
    assert [candidate.model for candidate in rank(reports, policy())[0]] == list(FORMS)


# ---- other weights -----------------------------------------------------------------------------


def test_an_answer_from_other_weights_than_the_best_is_degraded() -> None:
    reports = {("a", FIRST): report(weights_id="w"), ("b", SECOND): report(weights_id="v"), ("c", THIRD): report()}
    assert degraded(reports) == {"a": False, "b": True, "c": False}
    assert degraded(reports, order=("b",)) == {"a": True, "b": False, "c": True}


def test_two_backends_on_one_file_have_the_same_weights_even_where_only_one_knows_them() -> None:
    assert degraded(one_form(a=report(), b=report(weights_id=None))) == {"a": False, "b": False}
    assert degraded(one_form(a=report(weights_id=None), b=report())) == {"a": False, "b": False}


def test_two_forms_of_unknown_weights_are_not_taken_for_the_same() -> None:
    reports = {("a", FIRST): report(weights_id=None), ("b", SECOND): report(weights_id=None)}
    assert degraded(reports) == {"a": False, "b": True}


def test_one_file_that_a_backend_quantises_on_loading_is_other_weights() -> None:
    assert degraded(one_form(a=report(weights_id="w"), b=report(weights_id="w as q4"))) == {"a": False, "b": True}


def test_a_rejected_backend_does_not_set_the_weights() -> None:
    reports = {("a", FIRST): report(available=False, reason="no"), ("b", SECOND): report(weights_id="v")}
    assert degraded(reports) == {"b": False}


# ---- rejections --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "wishes", "reason"),
    [
        ({"available": False, "reason": "the daemon is off"}, {}, "the daemon is off"),
        ({}, {"forbidden": frozenset({"a"})}, "forbidden by the settings"),
        ({}, {"only": "b"}, "only b was asked for"),
        ({"memory_bytes": 5 * GIB}, {"free_memory_bytes": 4 * GIB - 1}, "needs 5.0 GiB, 4.0 free"),
        ({}, {"require_device": "gpu"}, "would run on the CPU, and a GPU is required"),
    ],
)
def test_what_is_unsuitable_is_rejected_with_the_reason(
    facts: dict[str, object], wishes: dict[str, object], reason: str
) -> None:
    candidates, rejected = rank(one_form(a=report(hint="mend it", **facts)), policy(**wishes))
    assert candidates == ()
    (rejection,) = rejected
    assert (rejection.backend, rejection.model, rejection.reason, rejection.hint) == ("a", FIRST, reason, "mend it")


def test_what_runs_already_needs_no_further_memory() -> None:
    reports = one_form(a=report(memory_bytes=5 * GIB), b=report(memory_bytes=5 * GIB))
    candidates, rejected = rank(reports, policy(free_memory_bytes=GIB, running=frozenset({("a", FIRST)})))
    assert [candidate.backend for candidate in candidates] == ["a"]
    assert [rejection.backend for rejection in rejected] == ["b"]


@pytest.mark.parametrize(("need", "free"), [(None, GIB), (5 * GIB, None), (GIB, GIB), (0, 0)])
def test_memory_unknown_or_just_enough_is_no_reason_to_reject(need: int | None, free: int | None) -> None:
    assert order(one_form(a=report(memory_bytes=need)), free_memory_bytes=free) == ["a"]


@pytest.mark.parametrize("device", ["cuda", None])
def test_a_required_gpu_rejects_only_what_is_known_to_run_on_the_cpu(device: str | None) -> None:
    assert order(one_form(a=report(device=device)), require_device="gpu") == ["a"]


def test_nothing_asked_nothing_ranked() -> None:
    assert rank({}, policy()) == ((), ())


# ---- reasons -----------------------------------------------------------------------------------


def test_every_fact_that_decided_is_among_the_reasons() -> None:
    reports = {("a", FIRST): report(device="cuda"), ("b", SECOND): report(weights_id="v", preference=70)}
    wishes = {"order": ("x", "a"), "measured_tokens_per_s": {("a", FIRST): 41.7}}
    first, second = rank(reports, policy(**wishes))[0]
    assert first.reasons == ("your order: 2.", "runs on cuda", "measured 42 tokens/s", "preference 50")
    assert second.reasons == ("other weights", "runs on cpu", "preference 70")


def test_the_only_backend_asked_for_says_so() -> None:
    (candidate,) = rank(one_form(a=report()), policy(only="a"))[0]
    assert "asked for" in candidate.reasons


# ---- properties --------------------------------------------------------------------------------

BACKENDS = ("a", "b", "c", "d")
ELSEWHERE = ModelRef(scheme="path", rest="/not/among/the/forms")
KEYS = st.tuples(st.sampled_from(BACKENDS), st.sampled_from([*FORMS, ELSEWHERE, ModelRef(scheme="hf", rest="x")]))
REPORTS = st.builds(
    ProbeReport,
    available=st.booleans(),
    reason=st.just("no"),
    device=st.sampled_from([None, "cpu", "cuda"]),
    memory_bytes=st.sampled_from([None, GIB, 3 * GIB]),
    weights_id=st.sampled_from([None, "v", "w"]),
    preference=st.sampled_from([0, 50]),
)
POLICIES = st.builds(
    Policy,
    order=st.permutations(BACKENDS).flatmap(lambda names: st.integers(0, 3).map(lambda n: tuple(names[:n]))),
    only=st.sampled_from([None, None, None, "a"]),
    forbidden=st.frozensets(st.sampled_from(BACKENDS), max_size=1),
    models=st.permutations(FORMS).map(tuple),
    free_memory_bytes=st.sampled_from([None, 2 * GIB]),
    running=st.frozensets(KEYS, max_size=1),
    measured_tokens_per_s=st.dictionaries(KEYS, st.sampled_from([1.0, 2.0])),
    require_device=st.sampled_from([None, "gpu"]),
)
ASKED = st.dictionaries(KEYS, REPORTS, max_size=8)


@given(ASKED, POLICIES, st.randoms(use_true_random=False))
def test_the_order_in_which_the_answers_came_does_not_matter(
    reports: dict[Key, ProbeReport], wishes: Policy, dice: random.Random
) -> None:
    shuffled = list(reports.items())
    dice.shuffle(shuffled)
    assert rank(dict(shuffled), wishes) == rank(reports, wishes)


def test_forms_the_user_did_not_list_stand_last_in_an_order_of_their_own() -> None:
    others = [ModelRef(scheme="path", rest=f"/{n}") for n in range(5)]
    reports = {("a", form): report() for form in [*others, FIRST]}
    for listed in (reports, dict(reversed(reports.items()))):
        assert [candidate.model for candidate in rank(listed, policy())[0]] == [FIRST, *others]


@given(ASKED, POLICIES)
def test_ranking_changes_nothing_and_says_the_same_again(reports: dict[Key, ProbeReport], wishes: Policy) -> None:
    before = copy.deepcopy((reports, wishes))
    once = rank(reports, wishes)
    assert (reports, wishes) == before
    assert rank(reports, wishes) == once


@given(ASKED, POLICIES)
def test_everything_asked_is_either_a_candidate_or_rejected_with_a_reason(
    reports: dict[Key, ProbeReport], wishes: Policy
) -> None:
    candidates, rejected = rank(reports, wishes)
    told = [(c.backend, c.model) for c in candidates] + [(r.backend, r.model) for r in rejected]
    assert len(told) == len(reports)
    assert set(told) == reports.keys()
    assert all(rejection.reason for rejection in rejected)
    assert all(c.report == reports[c.backend, c.model] and c.report.available for c in candidates)


@given(ASKED, POLICIES)
def test_the_first_choice_is_never_degraded_and_the_rest_follows_within_the_users_order(
    reports: dict[Key, ProbeReport], wishes: Policy
) -> None:
    candidates = rank(reports, wishes)[0]
    places = [
        (wishes.order.index(c.backend) if c.backend in wishes.order else len(wishes.order), c.degraded)
        for c in candidates
    ]
    assert places == sorted(places)
    assert not candidates or not candidates[0].degraded


@given(ASKED, POLICIES, KEYS)
def test_a_backend_that_cannot_run_the_model_changes_nothing_for_the_others(
    reports: dict[Key, ProbeReport], wishes: Policy, unable: Key
) -> None:
    without = {key: facts for key, facts in reports.items() if key != unable}
    with_it = {**without, unable: ProbeReport(available=False, reason="no")}
    assert rank(with_it, wishes)[0] == rank(without, wishes)[0]
