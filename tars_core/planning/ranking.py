"""Which backend is tried first, and why. Pure: facts and wishes in, an order with reasons out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from tars_core.types.models import ModelRef
from tars_core.types.reports import ProbeReport
from tars_core.types.results import Candidate, Rejection

Key: TypeAlias = tuple[str, ModelRef]
"""A backend's name and the form of the model it was asked about."""

_Item: TypeAlias = tuple[Key, ProbeReport]
_GIB = 2**30


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wishes and what the machine has."""

    order: tuple[str, ...] = ()
    """Backends the user prefers, best first."""
    only: str | None = None
    """The one backend the user named."""
    forbidden: frozenset[str] = frozenset()
    models: tuple[ModelRef, ...] = ()
    """The forms of the model, best first."""
    free_memory_bytes: int | None = None
    running: frozenset[Key] = frozenset()
    """What is loaded already and needs no further memory."""
    measured_tokens_per_s: Mapping[Key, float] = {}
    require_device: str | None = None


def rank(reports: Mapping[Key, ProbeReport], policy: Policy) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Return the candidates, best first, and what was rejected.

    The order: the user's, of backends; same weights as the best; the user's, of the model's forms, where forms with
    equal weights count as the first of them; real device before CPU; own measured speed; the plugin's preference; name.
    What does not fit the memory is rejected, not put last.
    """
    rejected: list[Rejection] = []
    fitting: list[_Item] = []
    for key, report in sorted(reports.items(), key=lambda item: _form(item[0], policy)):
        objection = _objection(key, report, policy)
        if objection is None:
            fitting.append((key, report))
        else:
            rejected.append(Rejection(backend=key[0], model=key[1], reason=objection, hint=report.hint))
    first_forms: dict[str | None, int] = {}
    for key, report in fitting:
        if report.weights_id is not None:
            first_forms.setdefault(report.weights_id, _form(key, policy)[0])
    fitting.sort(key=lambda item: _rank_key(item, policy, first_forms))
    ordered = sorted(fitting, key=lambda item: (_user_order(item[0], policy), _differs(item, fitting[0])))
    candidates = tuple(
        Candidate(
            backend=item[0][0],
            model=item[0][1],
            report=item[1],
            reasons=_reasons(item, policy, fitting[0]),
            degraded=_differs(item, fitting[0]),
        )
        for item in ordered
    )
    return candidates, tuple(rejected)


def _user_order(key: Key, policy: Policy) -> int:
    return policy.order.index(key[0]) if key[0] in policy.order else len(policy.order)


def _form(key: Key, policy: Policy) -> tuple[int, str, str]:
    form = policy.models.index(key[1]) if key[1] in policy.models else len(policy.models)
    return form, key[0], str(key[1])


def _rank_key(
    item: _Item, policy: Policy, first_forms: Mapping[str | None, int]
) -> tuple[int, int, int, float, int, str]:
    key, report = item
    return (
        _user_order(key, policy),
        first_forms.get(report.weights_id, _form(key, policy)[0]),
        0 if report.device not in (None, "cpu") else 1,
        -policy.measured_tokens_per_s.get(key, 0.0),
        -report.preference,
        key[0],
    )


def _differs(item: _Item, first: _Item) -> bool:
    """Say whether these are other weights than the first choice's; where they are unknown, the form tells."""
    if item[1].weights_id is None or first[1].weights_id is None:
        return item[0][1] != first[0][1]
    return item[1].weights_id != first[1].weights_id


def _objection(key: Key, report: ProbeReport, policy: Policy) -> str | None:
    if policy.only is not None and key[0] != policy.only:
        return f"only {policy.only} was asked for"
    if key[0] in policy.forbidden:
        return "forbidden by the settings"
    if not report.available:
        return report.reason
    need, free = report.memory_bytes, policy.free_memory_bytes
    if need is not None and free is not None and need > free and key not in policy.running:
        return f"needs {need / _GIB:.1f} GiB, {free / _GIB:.1f} free"
    if policy.require_device == "gpu" and report.device == "cpu":
        return "would run on the CPU, and a GPU is required"
    return None


def _reasons(item: _Item, policy: Policy, first: _Item) -> tuple[str, ...]:
    key, report = item
    reasons: list[str] = []
    if key[0] in policy.order:
        reasons.append(f"your order: {policy.order.index(key[0]) + 1}.")
    if policy.only == key[0]:
        reasons.append("asked for")
    if _differs(item, first):
        reasons.append("other weights")
    if report.device is not None:
        reasons.append(f"runs on {report.device}")
    if (speed := policy.measured_tokens_per_s.get(key)) is not None:
        reasons.append(f"measured {speed:.0f} tokens/s")
    reasons.append(f"preference {report.preference}")
    return tuple(reasons)
