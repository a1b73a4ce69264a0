"""Writes ``docs/parity.md`` from what the tests in this folder found: ``pytest tests/parity --write-parity``."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Generator
from pathlib import Path
from typing import TypeAlias

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BACKENDS = ("llamacpp", "xllamacpp", "transformers")
HEAD = """\
# One meaning on every backend

The same request to the same weights, by backend: what the tests in `tests/parity` found on the demo model, each backend
held against the next one. A figure is the number of cases that were alike.

<!-- written by: pytest tests/parity --write-parity -->

"""
FOOT = """
What is not the same, by design:

- A seed repeats its text on one backend. Another backend draws other tokens from the same candidates: each engine has
  a random generator of its own.
- llama.cpp and transformers add in another order. Where two tokens are almost equally likely, greedy text may part.
- Of a prompt beyond 1 MB that cannot fit the context, transformers reports how many tokens there are at the least; the
  others count them. It would take half a minute.
- transformers keeps `context_length` within what the model was trained for; llama.cpp goes beyond it where asked to.
"""

Counts: TypeAlias = "dict[tuple[str, str], collections.Counter[str]]"

_claims: dict[str, str] = {}
_collected: Counts = {}
_outcomes: Counts = {}


def _key(item: pytest.Item) -> tuple[str, str] | None:
    """Return the test's and the backend's name, for a test that has one."""
    if (
        isinstance(item, pytest.Function)
        and item.path.parent == Path(__file__).parent
        and hasattr(item, "callspec")
        and "name" in item.callspec.params
    ):
        return item.originalname, str(item.callspec.params["name"])
    return None


def _page(outcomes: Counts) -> str:
    lines = [f"| | {' | '.join(BACKENDS)} |", f"|---|{'---|' * len(BACKENDS)}"]
    for test, claim in _claims.items():
        cells = (_cell(outcomes.get((test, backend), collections.Counter())) for backend in BACKENDS)
        lines.append(f"| {claim} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + FOOT


def _cell(outcomes: collections.Counter[str]) -> str:
    if outcomes["failed"]:
        return f"✗ {outcomes['failed']} of {outcomes['failed'] + outcomes['passed']} differ"
    return f"✓ {outcomes['passed']}" if outcomes["passed"] else "not run"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", action="store_true", help="write docs/parity.md from what is found")


@pytest.hookimpl(tryfirst=True)  # before -k and --lf take tests away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and (key := _key(item)) is not None:
            _claims[item.originalname] = (inspect.getdoc(item.function) or "").replace("``", "`")
            _collected.setdefault(key, collections.Counter())["passed"] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (key := _key(item)) is not None and (report.when == "call" or not report.passed):
        _outcomes.setdefault(key, collections.Counter())[report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-parity", default=False):
        PAGE.write_text(_page(_outcomes), "utf-8")


@pytest.fixture
def page_if_all_pass(pytestconfig: pytest.Config) -> str:
    if pytestconfig.getoption("--write-parity", default=False):
        pytest.skip("the page is being written")
    if not _claims or any("::" in argument for argument in pytestconfig.args):
        pytest.skip("only some of the tests were collected")
    return _page(_collected)
