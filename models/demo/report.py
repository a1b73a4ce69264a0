"""The README's table, made from ``results.json`` so that the two cannot differ."""

from __future__ import annotations

import json
import re
from typing import Any

from checkpoint import RESULTS
from corpus import HERE

README = HERE / "README.md"
_PLACE = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)

_ROWS = (
    ("Published questions", "published"),
    ("Published questions, with a system prompt", "published_with_system_prompt"),
    ("**Phrasings written independently**", "independent"),
    ("Of these, wordings that are in no training line by chance", "independent_wording_never_trained"),
    ("Written independently, two to four typing mistakes in each", "independent_mistyped"),
    ("**Unknown questions refused, written independently**", "independent_unknown"),
    (
        "Of these, wordings that are in no training line by chance",
        "independent_unknown_wording_never_trained",
    ),
    ("Own phrasings never trained on", "own_held_out_lines"),
    ("The same, two to four typing mistakes in each", "own_held_out_lines_mistyped"),
    ("Own unknown questions never trained on", "own_held_out_unknown"),
)
_TURNS = (
    ("Published questions", "published_six_turns"),
    ("Written independently", "independent_six_turns"),
)


def table(evaluation: dict[str, Any]) -> str:
    """Two Markdown tables: single questions, and conversations of six."""
    lines = ["| | questions | greedy | greedy, repeat_penalty 1.1 | framework's default sampling |"]
    lines.append("|---|---|---|---|---|")
    for title, key in _ROWS:
        row = evaluation[key]
        cells = [f"{row[name]:.1f} %" for name in ("greedy", "repeat_penalty", "sampled")]
        lines.append(f"| {title} | {row['questions']} | {' | '.join(cells)} |")
    lines += ["", "| Six turns | conversations | answers right | sixth answer right | whole conversation right |"]
    lines.append("|---|---|---|---|---|")
    for title, key in _TURNS:
        row = evaluation[key]
        cells = [f"{row[name]:.1f} %" for name in ("answers", "sixth_answer", "whole")]
        lines.append(f"| {title} | {row['conversations']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def update_readme() -> None:
    """Put the table in its place."""
    evaluation = json.loads(RESULTS.read_text("utf-8"))["evaluation"]
    text = README.read_text("utf-8")
    README.write_text(_PLACE.sub(lambda _: table(evaluation), text), "utf-8")
