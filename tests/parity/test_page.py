"""The page about parity says what the tests beside this one find."""

from __future__ import annotations

from pathlib import Path


def test_the_page_is_up_to_date(page_if_all_pass: str) -> None:
    committed = (Path(__file__).parents[2] / "docs" / "parity.md").read_text("utf-8")
    assert committed == page_if_all_pass, "write it anew: pytest tests/parity --write-parity"
