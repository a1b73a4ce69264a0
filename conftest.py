"""Holds every test to 15 seconds, unless it is marked ``slow``."""

from __future__ import annotations

import tracemalloc  # noqa: F401 - pytest imports it in whatever thread a warning comes from, also in two at once
from collections.abc import Generator

import pytest

_MOST_S = 15.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that takes longer."""
    report = yield
    if report.when == "call" and report.passed and call.duration > _MOST_S and not item.get_closest_marker("slow"):
        report.outcome = "failed"
        report.longrepr = f"it took {call.duration:.1f} s, and may take {_MOST_S:g} s unless it is marked slow"
    return report
