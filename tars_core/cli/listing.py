"""``tars backends``, ``models``, ``plan`` and ``config show``: what there is, on 80 columns."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence

import click

from tars_core.cli import output
from tars_core.cli.plain import dump
from tars_core.config.settings import Settings
from tars_core.types.models import OfferedModel
from tars_core.types.reports import BackendStatus
from tars_core.types.results import Candidate, Decision

_GIB = 2**30
_INDENT = "    "


def backends(statuses: Sequence[BackendStatus], *, as_json: bool) -> None:
    """Print one line a plugin; below it the reason and the mend where it does not work."""
    if as_json:
        output.write(dump(list(statuses)))
        return
    if not statuses:
        click.echo("no plugin is installed", err=True)
        return
    rows = [(status.name, _state(status), status.device or "-", status.version) for status in statuses]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for status, row in zip(statuses, rows, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[1] = click.style(cells[1], fg=_colour(status))
        _line("  ".join(cells).rstrip())
        _note(status.reason, status.hint)
        if status.features:
            _note(f"features: {', '.join(status.features)}", None)
        for deviation in status.deviations:
            _note(f"differs: {deviation}", None)


def plan(decision: Decision, *, as_json: bool) -> None:
    """Print the candidates in order with their reasons, then what was rejected."""
    if as_json:
        output.write(dump(decision))
        return
    _line(f"model {decision.model}")
    if decision.notice:
        click.secho(f"note: {decision.notice}", err=True, dim=True)
    for place, candidate in enumerate(decision.candidates, start=1):
        _line(f"{place}. {click.style(candidate.backend, bold=True)}  {_facts(candidate)}")
        _note(", ".join(candidate.reasons), None)
        if candidate.report.features:
            _note(f"features: {', '.join(sorted(candidate.report.features))}", None)
    for rejection in decision.rejected:
        _line(f"-  {rejection.backend}  {click.style('not tried', fg='yellow')}")
        _note(rejection.reason, rejection.hint)


def _state(status: BackendStatus) -> str:
    if status.quarantined:
        return f"put aside ({status.quarantined})"
    if status.available is None:
        return "brings a model"
    return "available" if status.available else "unavailable"


def _colour(status: BackendStatus) -> str:
    if status.quarantined:
        return "red"
    return "yellow" if status.available is False else "green"


def _facts(candidate: Candidate) -> str:
    facts = [candidate.model.path.name if candidate.model.path else str(candidate.model)]
    if candidate.report.memory_bytes is not None:
        facts.append(f"{candidate.report.memory_bytes / _GIB:.1f} GiB")
    if candidate.report.context_length is not None:
        facts.append(f"trained for {candidate.report.context_length} tokens")
    return "  ".join(facts)


def models(offered: Sequence[OfferedModel], *, as_json: bool) -> None:
    """Print each model known by name, with its forms."""
    if as_json:
        output.write(dump(list(offered)))
        return
    if not offered:
        click.echo("no model is known by name; give a path: tars run -m model.gguf", err=True)
    for model in offered:
        _line(click.style(str(model.name), bold=True))
        for ref in model.refs:
            missing = ref.path is not None and not ref.path.exists()
            _line(f"{_INDENT}{ref}{click.style('  (not there)', fg='yellow') if missing else ''}")


def settings(settings: Settings, *, as_json: bool) -> None:
    """Print every setting with its value and origin."""
    listed = [(key, value, settings.origin(key)) for key, value in settings.listed()]
    if as_json:
        output.write(dump({key: {"value": value, "origin": origin} for key, value, origin in listed}))
        return
    for key, value, origin in listed:
        text = f"{key} = {json.dumps(value, ensure_ascii=False)}"
        _line(f"{text}  {click.style('# ' + origin, dim=True)}")


def _line(text: str) -> None:
    output.write((text if output.colours() else click.unstyle(text)) + "\n")


def _note(reason: str | None, hint: str | None) -> None:
    width = shutil.get_terminal_size().columns
    for text, lead in ((reason, ""), (hint, "→ ")):
        if text:
            _line(
                textwrap.fill(
                    lead + text,
                    width,
                    initial_indent=_INDENT,
                    subsequent_indent=_INDENT + " " * len(lead),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
